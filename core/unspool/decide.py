"""Deciding: the hooks of one round are called, and what they chose is checked and brought to the host.

The core's own limits speak between `select` and `stop_check`. Nothing of a request changes here; `grow.py` does that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unspool.errors import PluginError, UnspoolError
from unspool.group import PENDING, Draft, Group
from unspool.hooks import Growth
from unspool.plugin import Plugin
from unspool.step import Rows, Step, padded
from unspool.stop_text import StopText


@dataclass(eq=False)
class Children:
    """What `select` chose, on the host: parallel lists."""

    row: list[int]
    token: list[int]
    stream: list[int]
    waits: list[int] | None
    """1: the child waits for the next step wherever it comes to stand; None: none is told to."""
    score: list[tuple[float, ...]] | None
    """The strategy's own, or sums of log-probabilities where somebody reads them in this round."""
    own_score: bool
    pipeline_logprob: list[float] | None
    model_logprob: list[float] | None
    finish: list[str | None] = field(default_factory=list)
    drop: list[bool] = field(default_factory=list)
    below: dict[int, list[int]] = field(default_factory=dict)
    """row -> its children, in the order of select."""
    states: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """child -> the path states after it, as far as anybody has asked."""

    def may_go_on(self, child: int) -> bool:
        """Tell whether a child may go on in this step, if the pass has run its node."""
        return not (self.waits and self.waits[child])


@dataclass(eq=False)
class Decision:
    """What the hooks said of the rows of a round."""

    rows: Rows
    children: Children
    dead: frozenset[int]
    spoilt: frozenset[int]
    held: dict[int, dict[int, Draft]]
    """node of a held row -> the drafts that were hung below it."""


class FirstStands(list[str | None]):
    """Finish reasons: what is written first stays."""

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice) or self[index] is None:
            super().__setitem__(index, value)


class Decider:
    """Calls the hooks of one group.

    Args:
        group: the requests, with the readings of the pass.
        stop_text: finds stop strings in the text of paths.
    """

    def __init__(self, group: Group, stop_text: StopText) -> None:
        self.group, self.tree, self.pipeline = group, group.tree, group.pipeline
        self._stop_text = stop_text
        self._wants_logprobs = any(live.request.logprobs for live in group.lives)
        self._logprobs = self._wants_logprobs or self.pipeline.scores or self.pipeline.reads_logprob

    def decide(self, rows: Rows, round_: int = 0, *, looks_ahead: bool = False, one_by_one: bool = False) -> Decision:
        """Call the hooks of one round: transforms, select, limits, stop_check.

        Raises:
            Exception: whatever a hook raised; a `PluginError` that names it if the hooks are called one by one.
        """
        group, pipeline = self.group, self.pipeline
        one_by_one = one_by_one or group.recorder is not None
        raw = group.logits_of(rows.node)
        logits, peak = group.working_copy(rows, raw)
        step = Step(group, rows, round_=round_, raw=raw, looks_ahead=looks_ahead)
        if group.recorder:
            group.recorder.begin(logits)
        if pipeline.transforms:
            self._call("logits_transform", one_by_one, step=step, logits=logits)
        if peak is None:
            peak = logits.amax(dim=-1)
        dead: frozenset[int] = frozenset()
        spoilt: frozenset[int] = frozenset()
        if not pipeline.row_local:  # its topk must never see a NaN or a row without a candidate
            dead, spoilt = _health(peak.tolist())
            failing = {rows.request[row] for row in spoilt}
            keep = [i for i, r in enumerate(rows.request) if i not in dead and r not in failing]
            if len(keep) < len(rows):
                decision = self._decide_among(rows, keep, dead, spoilt, raw, logits, round_, one_by_one)
                if group.recorder:
                    group.recorder.end(step, decision)
                return decision
        decision = self._select(step, rows, raw, logits, peak, dead, spoilt, one_by_one)
        if group.recorder:
            group.recorder.end(step, decision)
        return decision

    def _decide_among(
        self,
        rows: Rows,
        keep: Sequence[int],
        dead: frozenset[int],
        spoilt: frozenset[int],
        raw: Tensor,
        logits: Tensor,
        round_: int,
        one_by_one: bool,
    ) -> Decision:
        """Select among the sound rows, and count rows as before."""
        index = torch.tensor(keep, dtype=torch.int64, device=logits.device)
        none = Children([], [], [], None, None, False, None, None)
        if not keep:
            return Decision(rows, none, dead, spoilt, {})
        some, raw, logits = rows.only(keep), raw[index], logits[index]
        step = Step(self.group, some, round_=round_, raw=raw)
        empty: frozenset[int] = frozenset()
        inner = self._select(step, some, raw, logits, logits.amax(dim=-1), empty, empty, one_by_one)
        inner.children.row = [keep[row] for row in inner.children.row]
        inner.children.below = {keep[row]: children for row, children in inner.children.below.items()}
        return Decision(rows, inner.children, dead, spoilt, inner.held)

    def _select(
        self,
        step: Step,
        rows: Rows,
        raw: Tensor,
        logits: Tensor,
        peak: Tensor,
        dead: frozenset[int],
        spoilt: frozenset[int],
        one_by_one: bool,
    ) -> Decision:
        group, pipeline, strategy = self.group, self.pipeline, self.pipeline.strategy
        assert not group.newly_held
        step.calls_for(strategy)
        growth = self._call("select", one_by_one, step=step, logits=logits)
        step.calls_for(None)
        if not isinstance(growth, Growth):
            raise PluginError(strategy.name, "select", f"it must return a Growth, not {type(growth).__name__}")
        children, peaks = self._to_host(step, rows, growth, logits, peak)
        if pipeline.row_local:
            dead, spoilt = _health(peaks)
            if dead or spoilt:
                ill = dead | spoilt
                _keep(children, [i for i, row in enumerate(children.row) if row not in ill])
        self._stop(step, rows, children, one_by_one)
        for child, row in enumerate(children.row):
            children.below.setdefault(row, []).append(child)
        held: dict[int, dict[int, Draft]] = {}
        for node, draft in group.newly_held.items():
            held.setdefault(draft.base, {})[node] = draft
        if not held.keys() <= set(rows.node):
            raise self._bad("it hung drafts below a node that is no row")
        group.newly_held = {}
        return Decision(rows, children, dead, spoilt, held)

    def _to_host(
        self, step: Step, rows: Rows, growth: Growth, logits: Tensor, peak: Tensor
    ) -> tuple[Children, list[float]]:
        """Check a growth and bring it to the host."""
        row, token, score, stream, waits = growth.row, growth.token, growth.score, growth.stream, growth.waits
        count = len(row)
        self._check_shapes(growth, count)
        ints = _listed([row, token, *(values for values in (stream, waits) if values is not None)], torch.int64)
        for name, values, end in (("rows", ints[0], len(rows)), ("tokens", ints[1], self.group.vocab_size)):
            if values and not (0 <= min(values) and max(values) < end):
                raise self._bad(f"{name} out of range: {min(values)} to {max(values)}, of {end}")
        streams = ints[2] if stream is not None else [rows.branch[r].stream for r in ints[0]]
        if len(set(zip(ints[0], ints[1], streams, strict=True))) < count:
            raise self._bad("the same (row, token, stream) twice")
        columns = [] if score is None else list((score if score.dim() == 2 else score[:, None]).unbind(1))
        floats = [peak, logits[row, token], *columns]
        if self._logprobs:
            floats.append(_logprob(logits, row, token))
        if self._wants_logprobs:
            floats.append(_logprob(step.raw.to(self.group.dtype), row, token))
        peaks, chosen, *pieces = _listed(floats, torch.float64)
        model_logprob = pieces.pop() if self._wants_logprobs else None
        logprob = pieces.pop() if self._logprobs else None
        scores: list[tuple[float, ...]] | None = None
        if score is not None:
            scores = list(zip(*pieces, strict=True))
        elif logprob is not None and not step.looks_ahead:
            scores = [(rows.branch[r].score[0] + value,) for r, value in zip(ints[0], logprob, strict=True)]
        waiting = ints[-1] if waits is not None else None
        children = Children(ints[0], ints[1], streams, waiting, scores, score is not None, logprob, model_logprob)
        possible = [
            i for i, value in enumerate(chosen) if value != -torch.inf and not (scores and scores[i][0] == -torch.inf)
        ]
        if len(possible) < count:
            _keep(children, possible)
        return children, peaks

    def _check_shapes(self, growth: Growth, count: int) -> None:
        for name, dtype in (("row", "int64"), ("token", "int64"), ("stream", "int64"), ("waits", "bool")):
            value = getattr(growth, name)
            if value is None and name in ("stream", "waits"):
                continue
            if not isinstance(value, Tensor) or value.shape != (count,) or value.dtype != getattr(torch, dtype):
                shape = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise self._bad(f"Growth.{name} must be {dtype} [{count}], not {shape}")
        if growth.score is not None and (growth.score.dim() not in (1, 2) or len(growth.score) != count):
            raise self._bad(f"Growth.score must be [{count}] or [{count}, c], not {tuple(growth.score.shape)}")

    def _bad(self, reason: str) -> PluginError:
        return PluginError(self.pipeline.strategy.name, "select", reason)

    def _stop(self, step: Step, rows: Rows, children: Children, one_by_one: bool) -> None:
        """Apply the core's limits, then let plugins and the strategy finish or drop."""
        length, now = self.tree.length, 0.0
        finish = FirstStands()
        for row, token in zip(children.row, children.token, strict=True):
            live = rows.lives[rows.request[row]]
            request, reason = live.request, None
            if token in request.end_ids:
                reason = "eos"
            elif request.limits.stop and self._stop_text.ends(live, rows.node[row], token):
                reason = "stop_string"
            elif length[rows.node[row]] + 1 >= request.limits.max_new_tokens:
                reason = "length"
            elif live.deadline is not None:
                now = now or time.monotonic()
                reason = "deadline" if now >= live.deadline else None
            finish.append(reason)
        children.finish = finish
        if not self.pipeline.has("stop_check") or not children.row:
            children.drop = [False] * len(finish)
            return
        growth = self._host_growth(rows, children)
        self._call("stop_check", one_by_one, step=step, growth=growth)
        count = len(finish)
        if len(growth.finish) != count or growth.drop.shape != (count,):
            reason = "growth.finish and growth.drop keep their length"
            raise PluginError(self.pipeline.strategy.name, "stop_check", reason)
        children.finish = [first or later for first, later in zip(finish, growth.finish, strict=True)]
        children.drop = growth.drop.tolist()
        if growth.score is not None:
            children.score = [tuple(columns) for columns in growth.score.reshape(count, -1).tolist()]

    def _host_growth(self, rows: Rows, children: Children) -> Growth:
        score = None
        if children.score is not None:
            score = torch.tensor(children.score, dtype=torch.float64)
            score = score.squeeze(1) if score.shape[1] == 1 else score
        parents = [rows.node[row] for row in children.row]

        def states(plugin: Plugin) -> list[Any]:
            index = self.group.state_index(plugin)
            return [self.states(rows, children, child)[index] for child in range(len(parents))]

        def paths() -> tuple[Tensor, Tensor]:
            ids, lengths = padded([self.tree.path(parent) for parent in parents], torch.device("cpu"))
            ids = torch.nn.functional.pad(ids, (0, 1))
            ids[torch.arange(len(parents)), lengths] = torch.tensor(children.token)
            return ids, lengths + 1

        return Growth(
            row=torch.tensor(children.row),
            token=torch.tensor(children.token),
            score=score,
            stream=torch.tensor(children.stream),
            waits=None if children.waits is None else torch.tensor(children.waits, dtype=torch.bool),
            request=torch.tensor([rows.request[row] for row in children.row]),
            finish=children.finish,
            drop=torch.zeros(len(parents), dtype=torch.bool),
            _states=states,
            _paths=paths,
        )

    def states(self, rows: Rows, children: Children, child: int) -> tuple[Any, ...]:
        """Give the path states after a child (None after an end id, which no plugin is asked about)."""
        if child not in children.states:
            children.states[child] = self._folded(rows, children, child)
        return children.states[child]

    def _folded(self, rows: Rows, children: Children, child: int) -> tuple[Any, ...]:
        row, token = children.row[child], children.token[child]
        parent = rows.node[row]
        if token in rows.lives[rows.request[row]].request.end_ids:
            return (None,) * len(self.pipeline.stateful)
        node, branch = self.tree.child(parent, token), rows.branch[row]
        known = self.tree.states[node] if node is not None else None
        above = branch.states if branch.node == parent else self.tree.states[parent]
        states = []
        for index, plugin in enumerate(self.pipeline.stateful):
            state = known[index] if known and not plugin.reads_logprob else PENDING
            if state is PENDING or state is None:
                before = above[index]
                try:
                    if plugin.reads_logprob:
                        assert children.pipeline_logprob is not None
                        state = plugin.advance(before, token, children.pipeline_logprob[child])
                    else:
                        state = plugin.advance(before, token)
                except Exception as error:
                    raise PluginError(plugin.name, "advance", reason_of(error)) from error
            states.append(state)
        return tuple(states)

    def _call(self, hook: str, one_by_one: bool, **arguments: Any) -> Any:
        """Call a hook of the whole pipeline: through pluggy, or plugin by plugin to know who it was."""
        if not one_by_one:
            return getattr(self.pipeline.hook, hook)(**arguments)
        answer = None
        for plugin, method in self.pipeline.implementations(hook):
            try:
                answer = method(**arguments)
            except UnspoolError:
                raise
            except Exception as error:
                raise PluginError(plugin.name, hook, reason_of(error)) from error
            if self.group.recorder and hook == "logits_transform":
                self.group.recorder.transformed(plugin.name, arguments["logits"])
        return answer

    def blame(self, rows: Rows, row: int) -> Exception:
        """Find out who made a row NaN or +inf, by replaying the chain on what the model said."""
        alone = rows.only([row])
        raw = self.group.logits_of(alone.node)
        if _health(raw.amax(dim=-1).tolist())[1]:
            return PluginError("the model", "forward", "its logits hold NaN or +inf")
        logits, _ = self.group.working_copy(alone, raw)
        step = Step(self.group, alone, raw=raw)
        for plugin, method in self.pipeline.implementations("logits_transform"):
            try:
                method(step=step, logits=logits)
            except Exception as error:
                return PluginError(plugin.name, "logits_transform", reason_of(error))
            if _health(logits.amax(dim=-1).tolist())[1]:
                return PluginError(plugin.name, "logits_transform", "it made a row NaN or +inf")
        return PluginError(self.pipeline.strategy.name, "logits_transform", "a row became NaN among others, not alone")


def _health(peaks: Sequence[float]) -> tuple[frozenset[int], frozenset[int]]:
    """Say which rows are dead (all -inf) and which are spoilt (NaN or +inf), by their largest logits."""
    dead = frozenset(i for i, peak in enumerate(peaks) if peak == -torch.inf)
    return dead, frozenset(i for i, peak in enumerate(peaks) if peak != peak or peak == torch.inf)


def _keep(children: Children, which: Sequence[int]) -> None:
    for name in ("row", "token", "stream", "waits", "score", "pipeline_logprob", "model_logprob"):
        values = getattr(children, name)
        if values is not None:
            setattr(children, name, [values[i] for i in which])


def _listed(columns: Sequence[Tensor], dtype: torch.dtype) -> list[list[Any]]:
    """Bring columns to the host: from a GPU in one copy, as `dtype`."""
    if columns[0].device.type == "cpu":
        return [values.tolist() for values in columns]
    flat = torch.cat([values.to(dtype) for values in columns]).to("cpu")
    return [values.tolist() for values in torch.split(flat, [len(values) for values in columns])]


def _logprob(logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Give the log-probability of each child's token: `[children]`."""
    return logits[row, token] - logits.logsumexp(-1)[row]


def reason_of(error: BaseException) -> str:
    """Say what was raised, in a line."""
    return f"{type(error).__name__}: {error}"
