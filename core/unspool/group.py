"""A group in one step: the requests of one pipeline, their drafts, and what the pass said of them.

`Step` is the plugins' view of it. `decide.py` calls the hooks, `grow.py` applies what they chose.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from unspool.errors import ModelError, PluginError
from unspool.lane import Lane, NoSlots, Readings, Share
from unspool.live import Live
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.rank import widened
from unspool.runner import Output
from unspool.step import Rows, Step
from unspool.tree import NONE
from unspool.worth import Worth

if TYPE_CHECKING:
    from unspool.trace import Recorder

PENDING: Final = object()
"""In place of a path state that depends on a log-probability which is not known before the pass."""

IMPOSSIBLE: Final = "impossible"
END: Final = "end"


@dataclass(eq=False, slots=True)
class Draft:
    """A draft of this step: who hung it, below which row's node and parent, and why it is a leaf, if it is one."""

    live: Live
    plugin: Plugin | None
    base: int
    parent: int
    leaf: str | None
    held: bool
    q: Tensor | None
    confidence: float | None
    """How sure its drafter is; None: it is run whatever it costs."""
    chance: float = 1.0
    """How likely its path is chosen, by what is known of such confidences; 1 where it has none."""
    chosen: bool = False
    """It has become a branch."""
    gained: bool = False
    """It has become a branch that went on at once: a step was saved."""
    kept: Mapping[Any, Tensor] | None = None
    """What was read of it in an earlier pass: it was a guess when a strategy hung it below a row that it holds."""

    @property
    def runs(self) -> bool:
        """Tell whether the pass runs it. Below a held row only the impossible is left out, and what has run already."""
        return self.kept is None and (self.leaf is None or (self.held and self.leaf == END))


class Group:
    """The live requests of one pipeline that have rows in this step.

    Args:
        pipeline: what they share.
        lives: the requests, oldest first.
        main: the target's lane.
        companions: the lanes of the pipeline's companions, by name.
        budget: drafts that may be added below each row.
        token_budget: most tokens of one pass of a companion that is asked.
        worth: knows which drafts pay.
        recorder: takes the trace, if anyone wants one.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        lives: Sequence[Live],
        main: Lane,
        companions: Mapping[str, Lane],
        budget: int,
        token_budget: int,
        worth: Worth,
        recorder: Recorder | None = None,
    ) -> None:
        self.pipeline, self.lives, self.main, self.lanes = pipeline, list(lives), main, companions
        self.budget, self.token_budget, self.worth, self.recorder = budget, token_budget, worth, recorder
        self.tree = main.tree
        runner = main.cache.runner
        self.device, self.vocab_size = runner.device, runner.vocab_size
        self.dtype = torch.float64 if runner.dtype == torch.float64 else torch.float32
        self.readings: Readings | None = None
        self.every_row: dict[str, Readings] = {}
        self.drafts: dict[int, Draft] = {}
        self.newly_held: dict[int, Draft] = {}
        """Drafts that the `select` which is running has hung below rows, for the next step."""
        self._asked: dict[str, dict[int, Tensor]] = {}
        self._kept: dict[int, Mapping[Any, Tensor]] = {}
        self._recall()

    def _recall(self) -> None:
        """Take up what rows hold from steps before."""
        for live in self.lives:
            for branch in live.branches:
                if branch.held is not None:
                    self._kept[branch.node] = branch.held.readings
                    for node, draft in branch.held.drafts.items():
                        self._remember(node, draft)
                        if draft.kept is not None:
                            self._kept[node] = draft.kept

    @cached_property
    def _live_of(self) -> dict[int, Live]:
        return {branch.node: live for live in self.lives for branch in live.branches}

    # ---- drafts -----------------------------------------------------------------------------------------------------

    def rows(self, lives: Sequence[Live]) -> Rows:
        """Give the rows with which the step begins: every branch of these requests."""
        return Rows.of([(live, branch) for live in lives for branch in live.branches])

    def hang(
        self,
        plugin: Plugin | None,
        parents: Sequence[int],
        tokens: Sequence[int],
        q: Tensor | None,
        confidence: Sequence[float] | None,
    ) -> list[int]:
        """Hang drafts for `Step.draft`. Settles at once what each of them is."""
        nodes = []
        # In select an accepted draft is a row like any other: only what is hung in this call is above something.
        known = self.drafts if self.readings is None else self.newly_held
        for i, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
            above = known.get(parent)
            if parent < 0 or token < 0 or (above is not None and above.leaf is not None):
                nodes.append(-1)
            else:
                base = above.base if above else parent
                sure = None if confidence is None else confidence[i]
                nodes.append(self._hang(plugin, base, parent, token, None if q is None else q[i], sure))
        return nodes

    def _hang(
        self, plugin: Plugin | None, base: int, parent: int, token: int, q: Tensor | None, confidence: float | None
    ) -> int:
        live = self._live_of.get(parent)
        if live is None:
            raise ValueError(f"{parent} is no row's node and no draft of this step")
        if token >= self.vocab_size:
            raise ValueError(f"the draft token {token} is outside the vocabulary of {self.vocab_size}")
        held = self.readings is not None  # hung by select, for the next step
        node = self.tree.child(parent, token)
        if node is not None and node in (self.newly_held if held else self.drafts):
            if not held and plugin is self.pipeline.strategy:
                self.drafts[node].plugin = plugin  # its own drafts are never deleted
            if not held and (plugin is self.pipeline.strategy or confidence is None):
                self.drafts[node].confidence = None
            return node
        chance = 1.0
        if confidence is not None and not held:
            above = self.drafts.get(parent)
            chance = self.worth.chance(live, plugin, confidence) * (above.chance if above else 1.0)
            if chance < self.worth.least:
                return NONE
        if node is None:
            node = self.tree.grow(parent, token)
            self.tree.states[node] = self._folded(live, parent, token)
        else:
            self.tree.hold(node)
        draft = Draft(live, plugin, base, parent, self._leaf(live, node, token), held, q, confidence, chance)
        self._remember(node, draft)
        if held:
            self.newly_held[node] = draft
        else:
            live.drafts.append(node)
        return node

    def _remember(self, node: int, draft: Draft) -> None:
        self.drafts[node] = draft
        self._live_of[node] = draft.live

    def _leaf(self, live: Live, node: int, token: int) -> str | None:
        """Say why nothing can follow a draft, if so."""
        request = live.request
        if token in request.end_ids:
            return END
        if any(state is None for state in self.tree.states[node]):
            return IMPOSSIBLE
        return END if self.tree.length[node] >= request.limits.max_new_tokens else None

    def _folded(self, live: Live, parent: int, token: int) -> tuple[Any, ...]:
        """Fold the path states over a draft: None where it cannot be, or is an end."""
        if token in live.request.end_ids:
            return (None,) * len(self.pipeline.stateful)
        states: list[Any] = []
        for plugin, before in zip(self.pipeline.stateful, self.tree.states[parent], strict=True):
            if plugin.reads_logprob:
                states.append(PENDING)
                continue
            try:
                states.append(plugin.advance(before, token))
            except Exception:  # on a draft that is no fault: nobody chose it
                states.append(None)
        return tuple(states)

    def live_of(self, node: int) -> Live | None:
        """Say whose row or draft a node is; None: nobody's."""
        return self._live_of.get(node)

    def trim(self) -> None:
        """Delete drafts over the budget of their row: the deepest first, then those hung last."""
        below: dict[int, list[int]] = {}
        for live in self.lives:
            for node in live.drafts:
                draft = self.drafts[node]
                if draft.plugin is not self.pipeline.strategy:
                    below.setdefault(draft.base, []).append(node)
        for nodes in below.values():
            if len(nodes) > self.budget:
                order = sorted(range(len(nodes)), key=lambda i: (self.tree.length[nodes[i]], i))
                for i in reversed(order[self.budget :]):
                    self.forget(nodes[i])

    def give_up_guesses(self) -> bool:
        """Delete all drafts but the strategy's own, for want of slots. False: there are none."""
        given_up = [self._give_up_guesses_of(live) for live in self.lives]
        return any(given_up)

    def give_up_idle_guesses(self) -> None:
        """Delete the guesses of requests that have nothing else to run: a pass for guesses alone saves none."""
        for live in self.lives if self.drafts else ():
            if all(branch.held is not None for branch in live.branches) and not live.held_drafts:
                self._give_up_guesses_of(live)

    def _give_up_guesses_of(self, live: Live) -> bool:
        guesses = [node for node in live.drafts if self.drafts[node].plugin is not self.pipeline.strategy]
        for node in sorted(guesses, key=self.tree.length.__getitem__, reverse=True):
            self.forget(node)
        return bool(guesses)

    def forget(self, node: int) -> None:
        """Delete a draft."""
        draft = self.drafts.pop(node)
        if node in draft.live.drafts:
            draft.live.drafts.remove(node)
        self.tree.release(node)

    def forget_drafts_of(self, live: Live) -> None:
        """Delete all drafts of a request in this step, the deepest first."""
        for node in reversed(live.drafts):
            self.drafts.pop(node, None)
            self.tree.release(node)
        live.drafts.clear()

    def prune(self, drafts: Iterable[int]) -> None:
        """Delete drafts that `select` hung and nobody holds, the deepest first."""
        for node in reversed(list(drafts)):
            self.drafts.pop(node, None)
            self.tree.release(node)

    def unhold(self) -> None:
        """Undo the drafts that a `select` which failed had hung."""
        hung, self.newly_held = self.newly_held, {}
        self.prune(hung)
        self._recall()  # what was hung once more

    def running_drafts(self, live: Live) -> list[int]:
        """List the drafts of a request that the pass is to run, parents first."""
        return [*live.held_drafts, *(node for node in live.drafts if self.drafts[node].runs)]

    def drafts_below(self, nodes: Sequence[int], plugin: Plugin | None) -> list[tuple[int, int]]:
        """List (row, draft) just below the nodes of rows."""
        children: dict[int, list[int]] = {}
        for node, draft in self.drafts.items():
            # By name: what is held may have been hung by the like of it in another request's pipeline.
            if plugin is None or (draft.plugin is not None and draft.plugin.name == plugin.name):
                children.setdefault(self.tree.parent[node], []).append(node)
        return [(row, child) for row, node in enumerate(nodes) for child in children.get(node, ())]

    # ---- what the pass said -----------------------------------------------------------------------------------------

    def beside(self) -> list[Lane]:
        """List the lanes that run beside every row."""
        return [self.lanes[name] for name, companion in self.pipeline.companions.items() if companion.every_row]

    def read(self, lane: Lane, readings: Readings) -> None:
        """Take what a pass of a lane said."""
        if lane is self.main:
            self.readings = readings
        for name in self.pipeline.companions:
            if self.lanes[name] is lane:
                self.every_row[name] = readings

    def read_nothing(self) -> None:
        """Go on without a pass: all rows are held, and none of their drafts could be run."""
        runner = self.main.cache.runner
        nothing = torch.empty((0, self.vocab_size), dtype=runner.dtype, device=runner.device)
        hidden = {layer: torch.empty((0, runner.width)) for layer in self.pipeline.hidden}
        self.readings = Readings(Output(nothing, hidden), {}, {})

    def logits_of(self, nodes: Sequence[int]) -> Tensor:
        """Give raw logits of nodes of this pass and of held rows: `[n, vocab]`."""
        assert self.readings is not None, "there are no logits before the pass"
        return self._gather(self.readings.logits, self.readings.row, nodes, "raw")

    def hidden_of(self, layer: int, nodes: Sequence[int]) -> Tensor:
        """Give hidden states of nodes of this pass and of held rows: `[n, width]`."""
        readings = self.readings
        assert readings is not None, "there are no hidden states before the pass"
        if layer not in readings.hidden:
            raise ValueError(f"layer {layer} is not declared: name it in `hidden`")
        return self._gather(readings.hidden[layer], readings.packed, nodes, ("hidden", layer))

    def path_hidden(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Give the stored hidden states of rows' paths."""
        store = self.main.cache.hidden.get(layer)
        if store is None or layer not in self.pipeline.path_hidden:
            raise ValueError(f"layer {layer} is not stored: name it in `path_hidden`")
        paths = []
        for request, node in zip(rows.request, rows.node, strict=True):
            context = self.main.trail(rows.lives[request], node).context
            paths.append(store[context if isinstance(context, slice) else torch.from_numpy(context).to(store.device)])
        hidden = paths[0][None] if len(paths) == 1 else torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
        lengths = torch.tensor([len(path) for path in paths], device=hidden.device)
        return hidden, torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)

    def ran(self, node: int) -> bool:
        """Tell whether there are readings of a node: of this pass, or kept of an earlier one."""
        return node in self._kept or (self.readings is not None and node in self.readings)

    def keep(self, node: int) -> Mapping[Any, Tensor]:
        """Copy all that was read of a node which is wanted in the next step too."""
        if node in self._kept and (self.readings is None or node not in self.readings.row):
            return self._kept[node]
        assert self.readings is not None
        kept: dict[Any, Tensor] = {"raw": self.logits_of([node])[0].clone()}
        for layer in self.readings.hidden:
            kept["hidden", layer] = self.hidden_of(layer, [node])[0].clone()
        for name in self.every_row:
            kept["companion", name] = self.companion(name, [node])[0].clone()
        return kept

    def _gather(self, values: Tensor, index: Mapping[int, int], nodes: Sequence[int], kind: Any) -> Tensor:
        at = [index.get(node, -1) for node in nodes]
        if -1 not in at:
            if at and at[-1] - at[0] == len(at) - 1 and all(b - a == 1 for a, b in pairwise(at)):
                return values[at[0] : at[0] + len(at)] if len(at) < len(values) else values
            return values[torch.tensor(at, dtype=torch.int64, device=values.device)]
        rows = []
        for node, place in zip(nodes, at, strict=True):
            if place >= 0:
                rows.append(values[place])
            elif node in self._kept and kind in self._kept[node]:
                rows.append(self._kept[node][kind])
            else:
                raise ValueError(f"node {node} was not run in this pass")
        return torch.stack(rows)

    # ---- companions -------------------------------------------------------------------------------------------------

    def companion(self, name: str, nodes: Sequence[int]) -> Tensor:
        """Give a companion's logits, running what it has not run: `[n, vocab]`."""
        if name not in self.lanes:
            raise ValueError(f"no companion {name!r}: declared are {sorted(self.lanes)}")
        readings = self.every_row.get(name)
        if readings is not None and all(node in readings or node in self._kept for node in nodes):
            return self._gather(readings.logits, readings.row, nodes, ("companion", name)).to(self.device)
        answers = self._asked.setdefault(name, {})
        wanted = [n for n in dict.fromkeys(nodes) if n >= 0 and n not in answers and self._runs(n)]
        if wanted:
            self._ask(self.lanes[name], wanted, answers)
        runner = self.lanes[name].cache.runner
        nothing = torch.zeros(self.vocab_size, dtype=runner.dtype, device=runner.device)
        return torch.stack([answers.get(node, nothing) for node in nodes]).to(self.device)

    def _runs(self, node: int) -> bool:
        return node not in self.drafts or self.drafts[node].leaf is None

    def _ask(self, lane: Lane, nodes: Sequence[int], answers: dict[int, Tensor]) -> None:
        by_live: dict[Live, list[int]] = {}
        for node in nodes:
            by_live.setdefault(self._live_of[node], []).append(node)
        shares = []
        for live, own in by_live.items():
            share = lane.missing(live, own)
            while len(share.prompt) + len(share.ancestors) > self.token_budget:
                self._run(lane, [share.first(self.token_budget)])
                share = lane.missing(live, own)
            fresh = [node for node in own if not (node == live.root and share.prompt)]
            shares.append(Share(live, share.prompt, share.ancestors, fresh))
        start = time.perf_counter()
        readings = self._run(lane, shares)
        if not any(share.prompt or share.ancestors for share in shares):
            self.worth.asked(lane, len(nodes), time.perf_counter() - start)
        for node in nodes:
            answers[node] = readings.logits[readings.row[node]]

    @staticmethod
    def _run(lane: Lane, shares: Sequence[Share]) -> Readings:
        try:
            return lane.run(shares)
        except NoSlots:
            raise
        except Exception as error:
            raise ModelError(f"a companion's pass failed: {type(error).__name__}: {error}") from error

    # ---- what the pipeline would choose -----------------------------------------------------------------------------

    def propose(self, rows: Rows, which: Sequence[int], nodes: Sequence[int], logits: Tensor) -> list[int]:
        """Answer `Step.propose`."""
        strategy = self.pipeline.strategy
        if not strategy.row_local:
            raise PluginError(strategy.name, "propose", "it is not row_local: it cannot say what it would choose")
        answers = [-1] * len(nodes)
        asked, step, edited = self._edited(rows, which, nodes, logits)
        growth = self.pipeline.hook.select(step=step, logits=edited) if asked else None
        if growth is not None:
            chosen = edited[growth.row, growth.token] > -torch.inf
            for row, token, fine in zip(growth.row.tolist(), growth.token.tolist(), chosen.tolist(), strict=True):
                if fine and answers[asked[row]] < 0:
                    answers[asked[row]] = token
        return answers

    def transformed(self, rows: Rows, which: Sequence[int], nodes: Sequence[int], logits: Tensor) -> Tensor:
        """Answer `Step.transformed`."""
        asked, _, edited = self._edited(rows, which, nodes, logits)
        answer = edited.new_full((len(nodes), self.vocab_size), -torch.inf)
        answer[torch.tensor(asked, dtype=torch.int64, device=answer.device)] = edited
        return answer

    def _edited(
        self, rows: Rows, which: Sequence[int], nodes: Sequence[int], logits: Tensor
    ) -> tuple[list[int], Step, Tensor]:
        """Apply the transforms at nodes below rows. Give which of them are no leaves, as rows of a step, and logits."""
        lives = [rows.lives[rows.request[row]] for row in which]
        asked = [i for i, node in enumerate(nodes) if node >= 0 and self._runs(node)]  # nothing follows a leaf
        asked.sort(key=lambda i: (lives[i].order, i))
        table = Rows.at([(lives[i], rows.branch[which[i]], nodes[i]) for i in asked])
        raw = logits[torch.tensor(asked, dtype=torch.int64, device=logits.device)]
        step, edited = Step(self, table, raw=raw), self.working_copy(table, raw)[0]
        for plugin, method in self.pipeline.implementations("logits_transform") if asked else ():
            if not (plugin.reads_logprob or plugin.hidden or plugin.path_hidden or plugin.companions()):
                method(step=step, logits=edited)
        return asked, step, edited

    def working_copy(self, rows: Rows, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Copy raw logits into the working dtype, end ids banned where a row is below `min_new_tokens`.

        Returns:
            `[rows, vocab]`, and the largest logit of each row, where nobody will write to them.
        """
        length = self.tree.length
        banned: list[tuple[int, int]] = []
        if any(live.request.limits.min_new_tokens for live in rows.lives):
            banned += (
                (row, end)
                for row, (request, node) in enumerate(zip(rows.request, rows.node, strict=True))
                if length[node] < (prepared := rows.lives[request].request).limits.min_new_tokens
                for end in prepared.end_ids
            )
        if not banned and not self.pipeline.transforms:
            return widened(raw, self.dtype)
        logits = raw.to(self.dtype, copy=True)
        if banned:
            row, end = torch.from_numpy(np.array(banned, dtype=np.int64)).T.to(self.device)
            logits[row, end] = -torch.inf
        return logits, None

    def state_index(self, plugin: Plugin) -> int:
        """Give the place of a plugin's state among the states of a node."""
        return [p.name for p in self.pipeline.stateful].index(plugin.name)
