"""The catalogue: slips that a good programmer makes, in plugins and in the core, and the law that finds each.

`prove` must break the law on the plugin `of` while the slips are planted, and must not without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from power.plugins import ClaimsOfSearch, ClaimsOfTwice, Dimmed, Rationed, Said, Twice
from power.slips import Declaration, Slip, edit
from unspool import decide, grow, handle, noise, pipeline, plugin, rounds
from unspool.decide import Decider, FirstStands
from unspool.forward import Forward
from unspool.group import Group
from unspool.lane import Lane, _Packing
from unspool.lifecycle import Lifecycle
from unspool.plugin import Plugin
from unspool.schedule import Scheduler
from unspool.step import Step
from unspool.tree import Tree, _Ids
from unspool_beam.beam import BeamSearch
from unspool_beam.pool import Pool
from unspool_penalties import history
from unspool_penalties.bias import Endings
from unspool_penalties.dry import Dry
from unspool_penalties.forced import ForcedEos
from unspool_penalties.frequency import FrequencyPenalty
from unspool_penalties.length import ExponentialDecayLengthPenalty
from unspool_penalties.no_repeat_ngram import NoRepeatNgram
from unspool_penalties.repetition import RepetitionPenalty
from unspool_sample.eta import Eta
from unspool_sample.min_p import MinP
from unspool_sample.mirostat import Mirostat
from unspool_sample.sample import Sample, invert
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_sample.top_p import TopP
from unspool_sample.typical import Typical
from unspool_sample.xtc import Xtc
from unspool_testing import LAWS, Subject, Verdict, hosts, prove

EXAMPLES = 300
"""How many cases are tried at most. Nearly all faults are found within a few dozen."""


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Args:
        name: what is wrong, in a sentence.
        of: the plugin on which a law finds it: installed, of the kit, or a class.
        law: the law that finds it.
        slips: the changes.
        claims: what the plugin claims, where it has no claims of its own.
        params: parameters of the plugin that are not drawn.
    """

    name: str
    of: str | type[Plugin]
    law: str
    slips: tuple[Slip, ...]
    claims: type | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Name the functions and classes that are changed."""
        return ", ".join(dict.fromkeys(slip.where for slip in self.slips))

    @property
    def subject(self) -> Subject:
        """Give the plugin, ready to be proved."""
        return Subject.find(self.of, params=self.params, claims=self.claims)

    def find(self, *, examples: int = EXAMPLES, seed: int = 0, shrink: bool = False) -> Verdict:
        """Plant the fault and try to break its law.

        Args:
            examples: how many cases to try at most.
            seed: chooses the cases.
            shrink: look for the smallest case that breaks it, which takes longer than finding one.
        """
        with self.planted():
            return prove(LAWS[self.law], self.subject, examples=examples, seed=seed, shrink=shrink)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the fault for as long as the context lasts."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            for slip in self.slips:
                slip.plant(monkeypatch)
            yield


def fault(
    name: str, of: str | type[Plugin], law: str, *slips: Slip, claims: type | None = None, **params: Any
) -> Fault:
    """Describe a fault."""
    return Fault(name, of, law, slips, claims, params)


SAMPLING = (
    fault(
        "sampling draws from torch's global generator",
        "sample",
        "statelessness",
        edit(
            Sample.select,
            'token = (logits + step.gumbel("sample")).argmax(dim=-1)',
            "token = logits.softmax(dim=-1).multinomial(1).squeeze(-1)",
        ),
    ),
    fault(
        "XTC tosses its coin with torch's global generator",
        "xtc",
        "statelessness",
        edit(Xtc.logits_transform, 'uniform = step.uniform("xtc")', "uniform = torch.rand(len(logits))"),
    ),
    fault(
        "noise is added to probabilities instead of logits",
        "sample",
        "distribution",
        edit(Sample.select, '(logits + step.gumbel("sample"))', '(logits.softmax(dim=-1) + step.gumbel("sample"))'),
    ),
    fault(
        "the inverse of the distribution is read one token early",
        "sample",
        "distribution",
        edit(invert, "p.cumsum(dim=-1)", "(p.cumsum(dim=-1) - p)"),
        noise="uniform",
    ),
    fault(
        "top-p drops the token that reaches the mass",
        "top_p",
        "reference",
        edit(TopP.logits_transform, "order[:, 1:], beyond[:, :-1]", "order, beyond"),
    ),
    fault(
        "top-p counts a token's own mass as if it came before it",
        "top_p",
        "reference",
        edit(TopP.logits_transform, "order[:, 1:], beyond[:, :-1]", "order[:, 1:], beyond[:, 1:]"),
    ),
    fault(
        "top-k keeps one token more",
        "top_k",
        "reference",
        edit(
            TopK.logits_transform,
            ("max(p.k for p in params)", "max(p.k + 1 for p in params)"),
            ('step.values(self, "k")', '(step.values(self, "k") + 1)'),
        ),
    ),
    fault(
        "top-k keeps every token that ties with the last",
        "top_k",
        "reference",
        edit(
            TopK.logits_transform,
            "keep = above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))",
            "keep = above | tied",
        ),
    ),
    fault(
        "top-k gives each request of a group the largest k among them",
        "top_k",
        "batch_invariance",
        edit(
            TopK.logits_transform,
            'k = step.values(self, "k").to(logits.device, torch.int64).clamp(max=widest).unsqueeze(-1)',
            "k = torch.full((len(logits), 1), widest)",
        ),
    ),
    fault(
        "min-p takes a fraction of the largest logit instead of the largest probability",
        "min_p",
        "reference",
        edit(
            MinP.logits_transform,
            'logits.amax(dim=-1, keepdim=True) + step.values(self, "p").to(logits).log().unsqueeze(-1)',
            'logits.amax(dim=-1, keepdim=True) * step.values(self, "p").to(logits).unsqueeze(-1)',
        ),
    ),
    fault(
        "min-p compares with the best token of all rows",
        "min_p",
        "batch_invariance",
        edit(MinP.logits_transform, "logits.amax(dim=-1, keepdim=True)", "logits.amax()"),
    ),
    fault(
        "min-p reads a request's parameter from the plugin",
        "min_p",
        "batch_invariance",
        edit(
            MinP.logits_transform,
            'step.values(self, "p").to(logits).log().unsqueeze(-1)',
            "logits.new_tensor(self.params.p).log()",
        ),
    ),
    fault(
        "the entropy of eta sampling is summed over all rows",
        "eta",
        "path_purity",
        edit(Eta.logits_transform, ".sum(dim=-1, keepdim=True)", ".sum()"),
    ),
    fault(
        "typical sampling orders the row before it in the batch",
        "typical",
        "batch_invariance",
        edit(Typical.logits_transform, "ranked.gather(-1, last)", "ranked.roll(1, 0).gather(-1, last)"),
    ),
    fault(
        "temperature is applied twice",
        "temperature",
        "reference",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1).square())',
        ),
    ),
    fault(
        "temperature starts again from the model's logits, and undoes what came before it",
        "temperature",
        "reference",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.copy_(step.raw / step.values(self, "temperature").to(logits).unsqueeze(-1))',
        ),
    ),
    fault(
        "temperature writes to the model's own logits",
        "temperature",
        "cache_equals_recompute",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.copy_(step.raw.div_(step.values(self, "temperature").to(logits).unsqueeze(-1)))',
        ),
    ),
    fault(
        "mirostat changes its state in place",
        "mirostat",
        "path_purity",
        edit(
            Mirostat.advance,
            "return replace(state, mu=state.mu - state.eta * error)",
            'object.__setattr__(state, "mu", state.mu - state.eta * error)\n        return state',
        ),
    ),
    fault(
        "mirostat measures surprise in nats and its target in bits",
        "mirostat",
        "reference",
        edit(Mirostat.advance, "-logprob / math.log(2) - state.tau", "-logprob - state.tau"),
        tau=1.0,
    ),
)

PENALTIES = (
    fault(
        "the repetition penalty misses the prompt",
        "repetition_penalty",
        "reference",
        edit(RepetitionPenalty.logits_transform, "self.params.include_prompt", "False"),
    ),
    fault(
        "penalties count the padding of shorter paths as token 0",
        "repetition_penalty",
        "batch_invariance",
        edit(
            history.counted_ids,
            "counts = position < lengths.unsqueeze(-1)",
            "counts = torch.ones_like(ids, dtype=torch.bool)",
        ),
    ),
    fault(
        "penalties take the prompt to be as long as the longest",
        "presence_penalty",
        "batch_invariance",
        edit(history.counted_ids, "(lengths - step.length).unsqueeze(-1)", "(lengths - step.length).max()"),
    ),
    fault(
        "the frequency penalty counts a token once",
        "frequency_penalty",
        "reference",
        edit(
            history.counts,
            "found.scatter_add_(-1, ids, found.new_ones(()).expand(ids.shape))",
            "found.scatter_(-1, ids, 1.0)",
        ),
    ),
    fault(
        "the frequency penalty counts the drafts below a row as said",
        "frequency_penalty",
        "speculation_is_invisible",
        edit(
            FrequencyPenalty.logits_transform,
            "logits.sub_(counts(step, logits, self.params.include_prompt) * penalty)",
            "logits.sub_(counts(step, logits, self.params.include_prompt) * penalty)\n"
            "        drafts = step.drafts()\n"
            "        logits[drafts.row, drafts.token] -= penalty[drafts.row, 0]",
        ),
    ),
    fault(
        "the frequency penalty keeps the first request's penalty on itself",
        "frequency_penalty",
        "statelessness",
        edit(
            FrequencyPenalty.logits_transform,
            'penalty = step.values(self, "penalty").to(logits).unsqueeze(-1)',
            'penalty = self.__dict__.setdefault("_kept", step.values(self, "penalty").to(logits)[:1])',
        ),
    ),
    fault(
        "no-repeat n-gram misses the n-gram that was completed last",
        "no_repeat_ngram",
        "constraint",
        edit(
            NoRepeatNgram.logits_transform,
            "start + n <= lengths.unsqueeze(-1)",
            "start + n < lengths.unsqueeze(-1)",
        ),
    ),
    fault(
        "no-repeat n-gram compares one token too few",
        "no_repeat_ngram",
        "reference",
        edit(NoRepeatNgram.logits_transform, "for offset in range(n - 1):", "for offset in range(n - 2):"),
    ),
    fault(
        "bad words are looked for at the padded end of the paths",
        "bad_words",
        "constraint",
        edit(Endings._begun, "lengths.unsqueeze(-1) - length", "ids.shape[-1] - length"),
    ),
    fault(
        "bad words are looked for at the end of the first row's path",
        "bad_words",
        "path_purity",
        edit(
            Endings._begun,
            "tail = ids.gather(-1, at.clamp(min=0))",
            "tail = ids[:1].expand_as(ids).gather(-1, at.clamp(min=0))",
        ),
    ),
    fault(
        "DRY looks at the token of the match instead of the one that followed it",
        "dry",
        "reference",
        edit(Dry._matches, "token = back[row, shift - 1]", "token = back[row, shift]"),
    ),
    fault(
        "the forced end comes one token late",
        "forced_eos",
        "reference",
        edit(ForcedEos.logits_transform, "step.length + 1 == limit", "step.length == limit"),
    ),
    fault(
        "the length penalty raises the first request's end tokens in every row",
        "exponential_decay_length_penalty",
        "batch_invariance",
        edit(ExponentialDecayLengthPenalty.logits_transform, ")[step.request]", ")[step.request * 0]"),
    ),
)

SMALL = (
    fault(
        "a path state is a list that advance appends to",
        Said,
        "path_purity",
        edit(Said.initial, "return ()", "return []"),
        edit(Said.advance, "return (*state, token)", "state.append(token)\n        return state"),
    ),
    fault(
        "a plugin remembers what it computed by the number of the node",
        "kit_tired",
        "statelessness",
        edit(
            hosts.Tired.logits_transform,
            "step.states(self)",
            '[self.__dict__.setdefault("_seen", {}).setdefault(*pair)'
            " for pair in zip(step.node.tolist(), step.states(self), strict=True)]",
        ),
    ),
    fault(
        "a parameter is scaled each time that it is read",
        Dimmed,
        "config_round_trip",
        edit(Dimmed.Params._as_given, "return value", "return value / 100"),
        edit(Dimmed.logits_transform, "self.params.percent / 100", "self.params.percent"),
    ),
    fault(
        "a stopping rule looks at the prompt as well",
        Twice,
        "reference",
        edit(Twice.stop_check, "ids[child, len(step.requests[request].prompt_ids) :", "ids[child, :"),
        claims=ClaimsOfTwice,
    ),
    fault(
        "a grammar's mask allows what its advance refuses",
        "kit_grammar",
        "constraint",
        edit(
            hosts.NoDoubles.logits_transform,
            "100.0 if self.params.lies and step.length[row] > 1 else -torch.inf",
            "logits[row, last]",
        ),
        lies=False,
    ),
    fault(
        "a grammar masks every row as the first one",
        "kit_grammar",
        "constraint",
        edit(
            hosts.NoDoubles.logits_transform,
            "enumerate(step.states(self))",
            "enumerate(step.states(self)[:1] * len(logits))",
        ),
        lies=False,
    ),
    fault(
        "guidance compares with what was said after the first row",
        "kit_guidance",
        "reference",
        edit(hosts.Guidance.logits_transform, 'step.companion("without")', 'step.companion("without")[:1]'),
    ),
)

STRATEGIES = (
    fault(
        "a strategy prefers tokens that are drafted",
        "kit_greedy",
        "speculation_is_invisible",
        edit(
            hosts.Likeliest.select,
            "return Growth(row=torch.arange(len(logits)), token=logits.argmax(-1))",
            "token, drafts = logits.argmax(-1), step.drafts()\n"
            "        token[drafts.row] = drafts.token\n"
            "        return Growth(row=torch.arange(len(logits)), token=token)",
        ),
    ),
    fault(
        "a search is declared row_local",
        "kit_search",
        "speculation_is_invisible",
        Declaration(hosts.NarrowSearch, "row_local", True),
    ),
    fault(
        "a search adds no score of the parent",
        "kit_search",
        "scores_add_up",
        edit(hosts.NarrowSearch.select, "score = (step.score[:, :1] + best).flatten()", "score = best.flatten()"),
    ),
    fault(
        "a search cuts to its width before it is known which candidates ended",
        "kit_search",
        "reference",
        edit(
            hosts.NarrowSearch.select,
            "order = score.argsort(descending=True, stable=True)",
            "order = score.argsort(descending=True, stable=True)[: self.params.width]",
        ),
        claims=ClaimsOfSearch,
    ),
    fault(
        "a search forgets a finished text that is not among the best",
        "kit_search",
        "reference",
        edit(
            hosts.NarrowSearch.stop_check,
            "ended[request] += 1",
            "ended[request] += 1\n                growth.drop[child] = kept[request] >= self.params.width",
        ),
        claims=ClaimsOfSearch,
    ),
    fault(
        "a search that has enough ends all of its group",
        "kit_search",
        "batch_invariance",
        edit(
            hosts.NarrowSearch.stop_check,
            "growth.drop |= (growth.request == request) & torch.tensor",
            "growth.drop |= torch.tensor",
        ),
    ),
    fault(
        "particles keep their parents' streams when they are drawn anew",
        "kit_particles",
        "batch_invariance",
        edit(hosts.Particles.select, "streams.append(torch.arange(len(rows)))", "streams.append(step.stream[rows])"),
    ),
    fault(
        "particles of all requests are drawn anew with the first one's noise",
        "kit_particles",
        "batch_invariance",
        edit(hosts.Particles.select, "uniform[rows[0]]", "uniform[0]"),
    ),
    fault(
        "particles add what was drawn instead of what the model said",
        "kit_particles",
        "scores_add_up",
        edit(
            hosts.Particles.select, "step.score[:, :1] + gain, step", "step.score[:, :1] + flat.gather(1, token), step"
        ),
    ),
)

BEAMS = (
    fault(
        "beam search ranks finished texts before the length penalty",
        "beam",
        "scores_add_up",
        edit(BeamSearch.stop_check, "score[child] /= self._weight(lengths[child])", "score[child] /= 1"),
    ),
    fault(
        "beam search forgets the parent's score",
        "beam",
        "scores_add_up",
        edit(BeamSearch.select, "step.score[:, :1] + logprobs", "step.score[:, :1] * 0 + logprobs"),
    ),
    fault(
        "beam search counts lengths without the end token",
        "beam",
        "scores_add_up",
        edit(BeamSearch.stop_check, "+ 1).tolist()", ").clamp(min=1).tolist()"),
    ),
    fault(
        "beam search forgets the last of its finished texts",
        "beam",
        "reference",
        edit(BeamSearch.stop_check, "elif place < width:", "elif place < max(1, width - 1):"),
    ),
    fault(
        "beam search takes no more candidates than beams",
        "beam",
        "reference",
        edit(BeamSearch._candidates, "max(2, 1 + len(request.end_ids)) * width", "width"),
    ),
    fault(
        "beam search is over with the first finished text",
        "beam",
        "reference",
        edit(Pool.is_enough, "len(self.scores) == self.width", "len(self.scores) > 0"),
    ),
    fault(
        "beam search takes the beams of another request for its own",
        "beam",
        "batch_invariance",
        edit(BeamSearch.select, "row = step.grid.gather(1, chosen // vocab)", "row = (chosen // vocab)"),
    ),
)

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
        edit(Decider.states, "if state is PENDING or state is None", "if state is None"),
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
            pipeline._group_params,
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
        edit(Lifecycle.end, "ranked[: request.n]", "ranked"),
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
            "if not self.pipeline.row_local and len(accepted) < len(after):",
            "if False:",
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
        edit(_Packing._span, "row[np.searchsorted(context, path)] = True", "row[:] = True"),
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
        edit(Lane.leave, "track.slots[: track.done].tolist()", "track.slots.tolist()"),
    ),
    fault(
        "a pass that fails keeps the slots of its prompts",
        "kit_greedy",
        "conservation",
        edit(Lane._undo, "self.cache.pool.give(track.claim, slot)", "pass"),
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
        edit(_Ids.extended, "if self.filled != at or at == len(self.array):", "if at == len(self.array):"),
    ),
    fault(
        "a path is read where it lay before the request lost its slots",
        "kit_greedy",
        "cache_equals_recompute",
        edit(Lane.leave, "self._segments.pop(live.root, None)", "pass"),
    ),
    fault(
        "a freed node leaves the slots of its path behind",
        "kit_greedy",
        "cache_equals_recompute",
        edit(Lane.free, "self._segments.pop(node, None)", "pass"),
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
            "list(dict.fromkeys(branch.node for branch in live.branches if branch.held is None))",
            "[branch.node for branch in live.branches if branch.held is None]",
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
            "for share in shares:\n                    self._fail(share.live, fault)",
            "for live in list(self._scheduler.running):\n                    self._fail(live, fault)",
        ),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *SAMPLING,
    *PENALTIES,
    *SMALL,
    *STRATEGIES,
    *BEAMS,
    *HOOKS,
    *ENDS,
    *DRAFTS,
    *SLOTS,
    *FAILURES,
)
