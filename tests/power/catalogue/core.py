"""Faults in the core."""

from __future__ import annotations

from power.fault import Fault, fault
from power.plugins import Rationed
from power.slips import edit
from unspool import decide, grow, handle, noise, pipeline, plugin, rounds
from unspool.chain import Chain
from unspool.decide import Decider, FirstStands
from unspool.forward import Forward
from unspool.group import Group
from unspool.lane import Lane, _Packing
from unspool.lifecycle import Lifecycle
from unspool.prefixes import Prefixes
from unspool.schedule import Scheduler
from unspool.step import Step
from unspool.tree import Tree

HOOKS = (
    fault(
        "noise goes by the row's place in the batch",
        "sample",
        "batch_invariance",
        edit(Step._keys, "noise.key(seed, self.stream,", "noise.key(seed, torch.arange(len(seed)),"),
    ),
    fault(
        "noise goes by the number of passes instead of the position",
        "sample",
        "speculation_is_invisible",
        edit(
            Step._keys,
            "self.length + 1,",
            "self._ints([self._rows.lives[r].counts.forward_passes for r in self._rows.request]),",
        ),
    ),
    fault(
        "noise ignores the stream",
        "sample",
        "independence",
        edit(noise.key, "(stream + 1) * _GAMMA", "_GAMMA"),
    ),
    fault(
        "states are those of the branch, not of the row below it",
        "kit_tired",
        "speculation_is_invisible",
        edit(Step.states, "(branch.states if branch.node == node else of_node[node])", "branch.states"),
    ),
    fault(
        "paths end at the branch, not at the row below it",
        "no_repeat_ngram",
        "speculation_is_invisible",
        edit(Step._paths, "for node in self._rows.node", "for node in [b.node for b in self._rows.branch]"),
    ),
    fault(
        "a parameter of a request is taken from the first of the group",
        "kit_bias",
        "batch_invariance",
        edit(Step.values, "each[request] for request", "each[0] for request"),
    ),
    fault(
        "a state that waits for its log-probability passes for a state",
        "mirostat",
        "speculation_is_invisible",
        edit(Decider._folded, "if state is PENDING or state is None", "if state is None"),
    ),
    fault(
        "transforms write where the model's logits lie",
        "temperature",
        "cache_equals_recompute",
        edit(Group.working_copy, "if not banned and not self.pipeline.transforms:", "if not banned:"),
    ),
    fault(
        "the log-probabilities of the model are those of the pipeline",
        "temperature",
        "cache_equals_recompute",
        edit(
            grow.Grower._logprobs_after,
            'children.model_logprob if kind == "model" else children.pipeline_logprob',
            "children.pipeline_logprob or children.model_logprob",
        ),
    ),
    fault(
        "requests with different parameters form one group",
        "logit_bias",
        "batch_invariance",
        edit(
            pipeline.group_params,
            'params.model_dump(mode="json", exclude=set(per_request_fields(type(params))))',
            "{}",
        ),
    ),
    fault(
        "constraints act where the config lists them",
        "suppress_tokens",
        "constraint",
        edit(pipeline._Manager.parse_hookimpl_opts, '"tryfirst": True', '"tryfirst": False'),
    ),
)

ENDS = (
    fault(
        "an end token is looked for only where the step began",
        "kit_greedy",
        "stop_is_exact",
        edit(
            Decider._stop,
            "if token in request.end_ids:",
            "if token in request.end_ids and rows.branch[row].node == rows.node[row]:",
        ),
    ),
    fault(
        "max_new_tokens is counted from where the step began",
        "kit_greedy",
        "stop_is_exact",
        edit(
            Decider._stop,
            "length[rows.node[row]] + 1 >= request.limits.max_new_tokens",
            "length[rows.branch[row].node] + 1 >= request.limits.max_new_tokens",
        ),
    ),
    fault(
        "min_new_tokens is counted from where the step began",
        "kit_greedy",
        "speculation_is_invisible",
        edit(
            Group.working_copy,
            "zip(rows.request, rows.node, strict=True)",
            "zip(rows.request, [b.node for b in rows.branch], strict=True)",
        ),
    ),
    fault(
        "the limit is looked at before the end token",
        "kit_greedy",
        "stop_is_exact",
        edit(
            Decider._stop,
            ("if token in request.end_ids:", "if length[rows.node[row]] + 1 >= request.limits.max_new_tokens:"),
            ('reason = "eos"', 'reason = "length"'),
            ("elif length[rows.node[row]] + 1 >= request.limits.max_new_tokens:", "elif token in request.end_ids:"),
            (
                '                reason = "length"\n            elif live',
                '                reason = "eos"\n            elif live',
            ),
        ),
    ),
    fault(
        "a plugin overwrites a finish reason that stands",
        "kit_grammar",
        "stop_is_exact",
        edit(FirstStands.__setitem__, "if isinstance(index, slice) or self[index] is None:", "if True:"),
        lies=False,
    ),
    fault(
        "all texts of a search are returned, not the best n",
        "kit_search",
        "stop_is_exact",
        edit(Lifecycle.end, "self._ranked(live)[: request.n]", "self._ranked(live)"),
    ),
    fault(
        "texts are ranked worst first",
        "kit_search",
        "ranking",
        edit(plugin.Plugin.rank, "-(h.score if", "(h.score if"),
    ),
    fault(
        "samples are returned in the order in which they ended",
        "sample",
        "ranking",
        edit(Lifecycle._ranked, 'key=lambda h: (h.finish_reason == "cancelled", h.stream)', "key=lambda h: 0"),
    ),
    fault(
        "a token is streamed before finished texts agree on it",
        "kit_search",
        "streaming_is_final",
        edit(handle.newly_final, "for hypothesis in _returnable(live):", "for hypothesis in ():"),
    ),
    fault(
        "what the first branch says is streamed before the others agree",
        "kit_search",
        "streaming_is_final",
        edit(handle._agreed, "if len(set(tokens)) > 1:", "if False:"),
    ),
)

DRAFTS = (
    fault(
        "rounds held at once read the row of the first stream",
        "sample",
        "speculation_is_invisible",
        edit(
            rounds.Rounds._run_ahead,
            "place.get((live, branch.stream, branch.node))",
            "place.get((live, 0, branch.node))",
        ),
    ),
    fault(
        "a beam goes on while another waits for the next step",
        "kit_search",
        "speculation_is_invisible",
        edit(
            grow.Grower._grow_request,
            "goes_on = self.pipeline.row_local or len(accepted) == len(after)",
            "goes_on = True",
        ),
    ),
    fault(
        "accepted drafts are run again",
        "kit_greedy",
        "speculation_is_invisible",
        edit(
            grow.Grower._grow_request,
            "return [(live, branch) for branch in after if branch in accepted]",
            "return []",
        ),
    ),
    fault(
        "a branch on a draft does not count on its node",
        "kit_greedy",
        "conservation",
        edit(grow.Grower._child, "tree.hold(node)", "pass"),
    ),
    fault(
        "drafts see their siblings",
        "kit_greedy",
        "speculation_is_invisible",
        edit(_Packing._span, "row[path - first] = True", "row[:] = True"),
    ),
)

SLOTS = (
    fault(
        "a branch that has grown still counts on its old node",
        "kit_greedy",
        "conservation",
        edit(grow.Grower._step_on, "self.tree.release(before.node)", "pass"),
    ),
    fault(
        "the drafts under a held row stay when it has chosen",
        "kit_holds",
        "conservation",
        edit(grow.Grower._grow_request, "self._let_go(before.held.drafts)", "pass"),
    ),
    fault(
        "two held branches on one node count on its drafts once",
        "kit_holds",
        "conservation",
        edit(
            grow.Grower._hold,
            "for node in drafts:\n                self.tree.hold(node)",
            "pass",
        ),
    ),
    fault(
        "a cancelled request keeps the drafts under its held rows",
        "kit_holds",
        "conservation",
        edit(
            Lifecycle._release,
            "for node in reversed(list(branch.held.drafts)) if branch.held else ():",
            "for node in ():",
        ),
    ),
    fault(
        "a cancelled request frees all slots of a prompt of which a piece has run",
        "kit_greedy",
        "conservation",
        edit(Lane.leave, "track.slots[track.shared : track.done]", "track.slots[track.shared :]"),
    ),
    fault(
        "a pass that fails keeps the slots of its prompts",
        "kit_greedy",
        "conservation",
        edit(Lane.undo, "self.cache.pool.give(track.claim, slot)", "pass"),
    ),
    fault(
        "a prompt is taken to begin one token further like another than it does",
        "kit_greedy",
        "batch_invariance",
        edit(
            Prefixes.borrow,
            "same = in_common(below.tokens, tokens)",
            "same = min(in_common(below.tokens, tokens) + 1, len(below.tokens), len(tokens))",
        ),
    ),
    fault(
        "a request does not count on what it takes over of another's prompt",
        "kit_greedy",
        "conservation",
        edit(Prefixes.borrow, "prefix.users += 1", "pass"),
    ),
    fault(
        "a piece of a prompt that two have run keeps both its slots",
        "kit_greedy",
        "conservation",
        edit(Lane._give, "for slot in twice:", "for slot in ():"),
    ),
    fault(
        "a path is read where it lay before its prompt was found in the tree",
        "kit_recall",
        "batch_invariance",
        edit(Lane.keep, "self.forget_trail(node)", "pass"),
        texts=[[1, 1, 1, 1], [0, 0, 0, 0]],
    ),
    fault(
        "a slot that was freed still belongs to its node",
        "kit_greedy",
        "conservation",
        edit(
            Lane.free,
            ("self._owner.pop(node, None)", "self._owner.get(node)"),
            ("self.slot.pop(node)", "self.slot[node]"),
        ),
    ),
    fault(
        "a plugin does not hear of the end of a request that failed",
        "kit_search",
        "conservation",
        edit(
            Lifecycle._close,
            "if error := self._tell_end(live, result):",
            "if result.error is None and (error := self._tell_end(live, result)):",
        ),
    ),
    fault(
        "a child does not count on its parent",
        "kit_greedy",
        "conservation",
        edit(Tree.grow, "self._count[parent] += 1", "pass"),
    ),
    fault(
        "a fork writes into the path of its sibling",
        "kit_search",
        "cache_equals_recompute",
        edit(Chain.extended, "if self.filled != at or at == len(self.array):", "if at == len(self.array):"),
    ),
    fault(
        "a path is read where it lay before the request lost its slots",
        "kit_greedy",
        "cache_equals_recompute",
        edit(Lane.leave, "self._trails.pop(live.root, None)", "pass"),
    ),
    fault(
        "a freed node leaves the slots of its path behind",
        "kit_greedy",
        "cache_equals_recompute",
        edit(Lane.free, "self._trails.pop(node, None)", "self._trails.get(node)"),
    ),
    fault(
        "a prompt in pieces counts its positions from each piece",
        "kit_greedy",
        "cache_equals_recompute",
        edit(_Packing._prompt, "self.positions += piece", "self.positions += range(len(piece))"),
    ),
    fault(
        "a preempted request begins its own object anew",
        Rationed,
        "batch_invariance",
        edit(
            Scheduler.preempt,
            "live.counts.preemptions += 1",
            "live.counts.preemptions += 1\n"
            "        live.own = {p.name: p.open(live.request) for p in live.request.pipeline.owners}",
        ),
        ration=6,
    ),
    fault(
        "a preempted request keeps what its rows held",
        "kit_holds",
        "conservation",
        edit(Scheduler.preempt, "branch.held = None", "pass"),
    ),
    fault(
        "a preempted branch loses its score",
        "kit_search",
        "batch_invariance",
        edit(Scheduler.preempt, "node = branch.node\n", "node, branch.score = branch.node, (0.0,)\n"),
    ),
    fault(
        "a companion runs after the request's own prompt",
        "kit_guidance",
        "reference",
        edit(Scheduler.prompts, "own if prompt is None else np.array(prompt, dtype=np.int64)", "own"),
    ),
    fault(
        "a companion's prompt ends in the target's last token",
        "kit_guidance",
        "batch_invariance",
        edit(_Packing.add, "int(track.prompt[-1]) if node == live.root else tree.token[node]", "tree.token[node]"),
    ),
    fault(
        "a node with two branches is run twice",
        "kit_greedy",
        "cost",
        edit(
            Scheduler.share,
            "list(dict.fromkeys([*(branch.node for branch in live.branches if branch.held is None), *drafts]))",
            "[*(branch.node for branch in live.branches if branch.held is None), *drafts]",
        ),
    ),
    fault(
        "a result counts passes but not the tokens of prompts",
        "kit_greedy",
        "cost",
        edit(Forward.run, "counts.rows += share.tokens", "counts.rows += len(share.nodes)"),
    ),
)

FAILURES = (
    fault(
        "one spoilt row condemns all rows of its group",
        "kit_greedy",
        "fault_isolation",
        edit(
            decide._health,
            "frozenset(i for i, peak in enumerate(peaks) if peak != peak or peak == torch.inf)",
            "frozenset(range(len(peaks)) if any(peak != peak or peak == torch.inf for peak in peaks) else ())",
        ),
    ),
    fault(
        "an exception in a hook fails every request of the group",
        "kit_greedy",
        "fault_isolation",
        edit(
            rounds.Rounds._decisions,
            ("for part in rows.by_request():", "for part in [rows]:"),
            (
                "self._fail(part.lives[0], fault)",
                "for live in part.lives:\n                    self._fail(live, fault)",
            ),
        ),
    ),
    fault(
        "a pass that fails takes every running request with it",
        "kit_greedy",
        "fault_isolation",
        edit(
            Forward.run,
            "for live in dict.fromkeys(share.live for own in shares.values() for share in own):",
            "for live in list(self._scheduler.running):",
        ),
    ),
)

FAULTS: tuple[Fault, ...] = (*HOOKS, *ENDS, *DRAFTS, *SLOTS, *FAILURES)
