"""The rounds of a step: transform, select, stop, grow.

`decide` calls the hooks and says what they chose; `grow` applies the growth rule: the children that are left become
branches, those that coincide with a draft of this pass are accepted and go on at once, the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unspool.errors import ConstraintError, PluginError, UnspoolError
from unspool.group import PENDING, Draft, Group
from unspool.hooks import Growth
from unspool.live import Branch, Held, Live, Logprobs, logprob_list
from unspool.plugin import Plugin
from unspool.request import Hypothesis
from unspool.step import Rows, Step, padded
from unspool.stop_text import StopText

Standing = tuple[Live, Branch]


@dataclass(eq=False)
class Children:
    """What `select` chose, on the host: parallel lists."""

    row: list[int]
    token: list[int]
    stream: list[int]
    score: list[tuple[float, ...]] | None
    """The strategy's own, or sums of log-probabilities where somebody reads them in this round."""
    own_score: bool
    pipeline_logprob: list[float] | None
    model_logprob: list[float] | None
    finish: list[str | None] = field(default_factory=list)
    drop: list[bool] = field(default_factory=list)
    below: dict[int, list[int]] = field(default_factory=dict)
    """row -> its children, in the order of select."""


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


class Rounds:
    """All rounds of one group in one step.

    Args:
        group: the requests, with the readings of the pass.
        fail: what to do with a request that fails.
        stop_text: finds stop strings in the text of paths.
    """

    def __init__(
        self,
        group: Group,
        fail: Callable[[Live, Exception], None],
        stop_text: StopText,
    ) -> None:
        self.group, self.tree, self.pipeline = group, group.tree, group.pipeline
        self._fail, self._stop_text = fail, stop_text
        self._wants_logprobs = any(live.request.logprobs for live in group.lives)
        self._logprobs = self._wants_logprobs or self.pipeline.scores or self.pipeline.reads_logprob

    def run(self) -> None:
        """Hold rounds until nothing goes on."""
        for live in self.group.lives:
            live.accepted = 0
        if self.pipeline.looks_ahead and self.group.drafts and self._run_ahead():
            return
        standing = [(live, branch) for live in self.group.lives for branch in live.branches]
        round_ = 0
        while standing:
            following: list[Standing] = []
            for decision in self._decisions(Rows.of(standing), round_):
                following += self.grow(decision, range(len(decision.rows)))
            standing, round_ = following, round_ + 1

    def _run_ahead(self) -> bool:
        """Hold all rounds at once: one row for each branch on each draft below it, then walk. False: it cannot be."""
        group, parent = self.group, self.tree.parent
        below: dict[int, list[int]] = {}
        for node, draft in group.drafts.items():
            if draft.runs:
                below.setdefault(parent[node], []).append(node)
        table: list[tuple[Live, Branch, int]] = []
        place: dict[tuple[Live, int, int], int] = {}
        for live in group.lives:
            for branch in live.branches:
                stack = [branch.node]
                while stack:
                    node = stack.pop()
                    place[live, branch.stream, node] = len(table)
                    table.append((live, branch, node))
                    stack += reversed(below.get(node, []))
        start = [place[live, branch.stream, branch.node] for live in group.lives for branch in live.branches]
        try:
            decision = self.decide(Rows.at(table), looks_ahead=True)
        except Exception:  # any fault may stand on a row that will turn out not to exist
            return False
        while start:
            following = self.grow(decision, start)
            places = [place.get((live, branch.stream, branch.node)) for live, branch in following]
            start = [row for row in places if row is not None]
        return True

    # ---- decide -----------------------------------------------------------------------------------------------------

    def _decisions(self, rows: Rows, round_: int) -> list[Decision]:
        """Decide for all requests together; if a hook raises, for each alone, so that only those that fail fail."""
        try:
            return [self.decide(rows, round_)]
        except Exception:
            self._unhold()
        decisions = []
        for part in rows.by_request():
            try:
                decisions.append(self.decide(part, round_, one_by_one=True))
            except Exception as error:
                self._unhold()
                strategy = self.pipeline.strategy.name
                fault = error if isinstance(error, UnspoolError) else PluginError(strategy, "select", _reason(error))
                self._fail(part.lives[0], fault)
        return decisions

    def decide(self, rows: Rows, round_: int = 0, *, looks_ahead: bool = False, one_by_one: bool = False) -> Decision:
        """Call the hooks of one round: transforms, select, limits, stop_check.

        Raises:
            Exception: whatever a hook raised; a `PluginError` that names it if the hooks are called one by one.
        """
        group, pipeline = self.group, self.pipeline
        one_by_one = one_by_one or group.recorder is not None
        raw = group.logits_of(rows.node)
        logits = group.working_copy(rows, raw)
        step = Step(group, rows, round_=round_, raw=raw, looks_ahead=looks_ahead)
        if group.recorder:
            group.recorder.begin(logits)
        if pipeline.transforms:
            self._call("logits_transform", one_by_one, step=step, logits=logits)
        peak = logits.amax(dim=-1)
        dead: frozenset[int] = frozenset()
        spoilt: frozenset[int] = frozenset()
        if not pipeline.row_local:  # its topk must never see a NaN or a row without a candidate
            dead, spoilt = _health(peak.tolist())
            failing = {rows.request[row] for row in spoilt}
            keep = [i for i, r in enumerate(rows.request) if i not in dead and r not in failing]
            if len(keep) < len(rows):
                return self._decide_among(rows, keep, dead, spoilt, raw, logits, round_, one_by_one)
        return self._select(step, rows, raw, logits, peak, dead, spoilt, one_by_one)

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
        none = Children([], [], [], None, False, None, None)
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
        if group.recorder:
            group.recorder.end(step, rows, children, dead, held)
        return Decision(rows, children, dead, spoilt, held)

    def _to_host(
        self, step: Step, rows: Rows, growth: Growth, logits: Tensor, peak: Tensor
    ) -> tuple[Children, list[float]]:
        """Check a growth and copy it to the host: one copy of integers, one of floats."""
        row, token, score, stream = growth.row, growth.token, growth.score, growth.stream
        count = len(row)
        self._check_shapes(growth, count)
        ints = torch.stack([row, token] if stream is None else [row, token, stream]).to("cpu").tolist()
        for name, values, end in (("rows", ints[0], len(rows)), ("tokens", ints[1], self.group.vocab_size)):
            if values and not (0 <= min(values) and max(values) < end):
                raise self._bad(f"{name} out of range: {min(values)} to {max(values)}, of {end}")
        streams = ints[2] if stream is not None else [rows.branch[r].stream for r in ints[0]]
        if len(set(zip(ints[0], ints[1], streams, strict=True))) < count:
            raise self._bad("the same (row, token, stream) twice")
        columns = [] if score is None else list(score.reshape(count, -1).unbind(1))
        floats = [peak, logits[row, token], *columns]
        if self._logprobs:
            floats.append(_logprob(logits, row, token))
        if self._wants_logprobs:
            floats.append(_logprob(step.raw.to(self.group.dtype), row, token))
        flat = torch.cat([values.to(torch.float64) for values in floats]).to("cpu").tolist()
        peaks, flat = flat[: len(rows)], flat[len(rows) :]
        chosen, *pieces = [flat[i * count : (i + 1) * count] for i in range(len(floats) - 1)]
        model_logprob = pieces.pop() if self._wants_logprobs else None
        logprob = pieces.pop() if self._logprobs else None
        scores: list[tuple[float, ...]] | None = None
        if score is not None:
            scores = list(zip(*pieces, strict=True))
        elif logprob is not None and not step.looks_ahead:
            scores = [(rows.branch[r].score[0] + value,) for r, value in zip(ints[0], logprob, strict=True)]
        children = Children(ints[0], ints[1], streams, scores, score is not None, logprob, model_logprob)
        possible = [
            i for i, value in enumerate(chosen) if value != -torch.inf and not (scores and scores[i][0] == -torch.inf)
        ]
        if len(possible) < count:
            _keep(children, possible)
        return children, peaks

    def _check_shapes(self, growth: Growth, count: int) -> None:
        for name in ("row", "token", "stream"):
            value = getattr(growth, name)
            if value is None and name == "stream":
                continue
            if not isinstance(value, Tensor) or value.shape != (count,) or value.dtype != torch.int64:
                shape = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise self._bad(f"Growth.{name} must be int64 [{count}], not {shape}")
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
            return [self._states(rows, children, child)[index] for child in range(len(parents))]

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
            request=torch.tensor([rows.request[row] for row in children.row]),
            finish=children.finish,
            drop=torch.zeros(len(parents), dtype=torch.bool),
            _states=states,
            _paths=paths,
        )

    def _states(self, rows: Rows, children: Children, child: int) -> tuple[Any, ...]:
        """Give the path states after a child (None after an end id, which no plugin is asked about)."""
        row, token = children.row[child], children.token[child]
        parent = rows.node[row]
        if token in rows.lives[rows.request[row]].request.end_ids:
            return (None,) * len(self.pipeline.stateful)
        node = self.tree.child(parent, token)
        known = self.tree.states[node] if node is not None else None
        states = []
        for index, plugin in enumerate(self.pipeline.stateful):
            state = known[index] if known else PENDING
            if state is PENDING or state is None:
                before = self.tree.states[parent][index]
                try:
                    if plugin.reads_logprob:
                        assert children.pipeline_logprob is not None
                        state = plugin.advance(before, token, children.pipeline_logprob[child])
                    else:
                        state = plugin.advance(before, token)
                except Exception as error:
                    raise PluginError(plugin.name, "advance", _reason(error)) from error
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
                raise PluginError(plugin.name, hook, _reason(error)) from error
            if self.group.recorder and hook == "logits_transform":
                self.group.recorder.transformed(plugin.name, arguments["logits"])
        return answer

    def _blame(self, rows: Rows, row: int) -> Exception:
        """Find out who made a row NaN or +inf, by replaying the chain on what the model said."""
        alone = rows.only([row])
        raw = self.group.logits_of(alone.node)
        if _health(raw.amax(dim=-1).tolist())[1]:
            return PluginError("the model", "forward", "its logits hold NaN or +inf")
        logits = self.group.working_copy(alone, raw)
        step = Step(self.group, alone, raw=raw)
        for plugin, method in self.pipeline.implementations("logits_transform"):
            try:
                method(step=step, logits=logits)
            except Exception as error:
                return PluginError(plugin.name, "logits_transform", _reason(error))
            if _health(logits.amax(dim=-1).tolist())[1]:
                return PluginError(plugin.name, "logits_transform", "it made a row NaN or +inf")
        return PluginError(self.pipeline.strategy.name, "logits_transform", "a row became NaN among others, not alone")

    def _unhold(self) -> None:
        """Undo the drafts that a `select` which failed had hung."""
        hung, self.group.newly_held = self.group.newly_held, {}
        self._prune(hung)

    # ---- grow -------------------------------------------------------------------------------------------------------

    def grow(self, decision: Decision, which: Sequence[int]) -> list[Standing]:
        """Apply the growth rule to the rows `which` of a decision. Return the branches that go on at once."""
        rows, going = decision.rows, []
        by_live: dict[Live, list[int]] = {}
        for row in which:
            by_live.setdefault(rows.lives[rows.request[row]], []).append(row)
        may_fail = bool(self.pipeline.stateful or decision.spoilt)
        for live, its_rows in by_live.items():
            try:
                states = self._states_after(decision, its_rows) if may_fail else {}
            except Exception as error:
                for base in [b for b, drafts in decision.held.items() if any(d.live is live for d in drafts.values())]:
                    self._prune(decision.held.pop(base))
                self._fail(live, error)
                continue
            going += self._grow_request(decision, live, its_rows, states)
        return going

    def _states_after(self, decision: Decision, which: Sequence[int]) -> dict[int, tuple[Any, ...]]:
        """Do all that may fail, before anything changes: find spoilt rows, and fold the states of the children."""
        rows, children, stateful = decision.rows, decision.children, self.pipeline.stateful
        folded = {}
        for row in which:
            if row in decision.spoilt:
                raise self._blame(rows, row)
            if not stateful:
                continue
            for child in children.below.get(row, ()):
                if children.drop[child]:
                    continue
                states, token = self._states(rows, children, child), children.token[child]
                if None in states and token not in rows.lives[rows.request[row]].request.end_ids:
                    culprit = stateful[states.index(None)].name
                    path = [*self.tree.new_tokens(rows.node[row]), token]
                    reason = f"it calls token {token} impossible after new tokens {path}"
                    raise ConstraintError(culprit, "advance", reason)
                folded[child] = states
        return folded

    def _grow_request(
        self, decision: Decision, live: Live, rows: Sequence[int], states: dict[int, tuple[Any, ...]]
    ) -> list[Standing]:
        children, tree = decision.children, self.tree
        if not self.group.drafts and not decision.held and len(live.branches) == len(rows) == 1:
            return self._step_on(decision, live, rows[0], states)
        replaced: dict[Branch, list[Branch]] = {}
        grown: list[tuple[int, Branch]] = []
        for row in rows:
            before = self._standing(decision, live, row)
            new = replaced[before] = []
            below = children.below.get(row, ())
            drafts = decision.held.get(before.node)
            if row in decision.dead:
                live.dead_path = tree.new_tokens(before.node)
            elif drafts is not None and not below:
                self._hold(live, before, drafts)
                new.append(before)
            for child in below:
                if not children.drop[child]:
                    branch = self._child(live, before, children, child, states.get(child, ()))
                    if branch is not None:
                        new.append(branch)
                        grown.append((child, branch))
        if self.pipeline.row_local:
            after = [b for before in live.branches for b in replaced.get(before, [before])]
        else:  # the order of select is kept
            after = [before for before in live.branches if before in replaced.get(before, [before])]
            after += [branch for _, branch in sorted(grown, key=lambda pair: pair[0])]
        for before, new in replaced.items():
            if before not in new:
                if before.held is not None:
                    self._let_go(before.held.drafts)
                self.group.main.forget_segments(before.node)
                tree.release(before.node)
        live.branches = after
        for row in rows:  # drafts under a row that has a child: nobody holds them
            drafts = decision.held.pop(decision.rows.node[row], None)
            if drafts is not None and not any(b.held and b.held.drafts is drafts for b in after):
                self._prune(drafts)
        accepted = {branch for _, branch in grown if self._ran(branch.node)}
        count = len({b.node for b in accepted if (draft := self.group.drafts.get(b.node)) and not draft.held})
        live.accepted += count
        live.counts.accepted += count
        if not self.pipeline.row_local and len(accepted) < len(after):
            return []
        return [(live, branch) for branch in after if branch in accepted]

    def _step_on(self, decision: Decision, live: Live, row: int, states: dict[int, tuple[Any, ...]]) -> list[Standing]:
        """Grow a request of one branch where there are no drafts: the same rule, for most requests most of the time."""
        (before,) = live.branches
        if row in decision.dead:
            live.dead_path = self.tree.new_tokens(before.node)
        live.branches = [
            branch
            for child in decision.children.below.get(row, ())
            if not decision.children.drop[child]
            if (branch := self._child(live, before, decision.children, child, states.get(child, ()))) is not None
        ]
        self.group.main.forget_segments(before.node)
        self.tree.release(before.node)
        return []

    def _standing(self, decision: Decision, live: Live, row: int) -> Branch:
        """Find the branch that stands at a row now (looking ahead, it is a descendant of the row's branch)."""
        branch, node = decision.rows.branch[row], decision.rows.node[row]
        if branch.node == node:
            return branch
        return next(b for b in live.branches if b.node == node and b.stream == branch.stream)

    def _child(
        self, live: Live, before: Branch, children: Children, child: int, states: tuple[Any, ...]
    ) -> Branch | None:
        """Make a child a branch, or a hypothesis if it has ended."""
        tree, request = self.tree, live.request
        token, parent, stream = children.token[child], before.node, children.stream[child]
        score: tuple[float, ...] = ()
        if children.own_score or self.pipeline.scores or request.logprobs:
            if children.score is not None:
                score = children.score[child]
            elif children.pipeline_logprob is not None:
                score = (before.score[0] + children.pipeline_logprob[child],)
        live.scored = live.scored or bool(score)
        logprobs = self._logprobs_after(live, before, children, child)
        if live.counts.first_token is None:
            live.counts.first_token = time.monotonic()
        if (reason := children.finish[child]) is not None:
            tokens = (*tree.new_tokens(parent), token)
            kept = logprob_list(logprobs) if request.logprobs else None
            live.hypotheses.append(Hypothesis(tokens, reason, score[0] if score else None, "", kept, stream))
            return None
        node = tree.child(parent, token)
        if node is None:
            node = tree.grow(parent, token)
        else:
            tree.hold(node)
        tree.states[node] = states
        return Branch(node, stream, score or before.score, logprobs)

    def _logprobs_after(self, live: Live, before: Branch, children: Children, child: int) -> Logprobs:
        kind = live.request.logprobs
        if kind is None:
            return None
        values = children.model_logprob if kind == "model" else children.pipeline_logprob
        assert values is not None
        return before.logprobs, values[child]

    def _ran(self, node: int) -> bool:
        assert self.group.readings is not None
        return node in self.group.readings

    def _hold(self, live: Live, branch: Branch, drafts: dict[int, Draft]) -> None:
        readings = self.group.keep(branch.node)
        if any(other.held is not None and other.held.drafts is drafts for other in live.branches):
            drafts = dict(drafts)  # two branches on one node: each counts on the drafts
            for node in drafts:
                self.tree.hold(node)
        if branch.held is not None:
            self._let_go(branch.held.drafts)
        branch.held = Held(readings, drafts)

    def _let_go(self, drafts: Iterable[int]) -> None:
        for node in reversed(list(drafts)):
            self.tree.release(node)

    def _prune(self, drafts: Iterable[int]) -> None:
        for node in drafts:
            self.group.drafts.pop(node, None)
        self._let_go(drafts)


def _health(peaks: Sequence[float]) -> tuple[frozenset[int], frozenset[int]]:
    """Say which rows are dead (all -inf) and which are spoilt (NaN or +inf), by their largest logits."""
    dead = frozenset(i for i, peak in enumerate(peaks) if peak == -torch.inf)
    return dead, frozenset(i for i, peak in enumerate(peaks) if peak != peak or peak == torch.inf)


def _keep(children: Children, which: Sequence[int]) -> None:
    for name in ("row", "token", "stream", "score", "pipeline_logprob", "model_logprob"):
        values = getattr(children, name)
        if values is not None:
            setattr(children, name, [values[i] for i in which])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _logprob(logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Give the log-probability of each child's token: `[children]`."""
    return logits[row, token] - logits.logsumexp(-1)[row]
