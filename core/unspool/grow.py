"""The growth rule: the children that are left become branches.

A child that coincides with a draft which this pass has run is accepted, and goes on at once; any other waits for the
next step, and so does one that its strategy tells to wait. What ended is a hypothesis, and what no branch needs any
more is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from unspool.decide import Children, Decider, Decision
from unspool.errors import ConstraintError
from unspool.group import Draft, Group
from unspool.live import Branch, Held, Live, Logprobs, logprob_list
from unspool.request import Hypothesis

Standing = tuple[Live, Branch]


class Grower:
    """Grows the branches of one group.

    Args:
        group: the requests, with the readings of the pass.
        decider: knows the states after a child, and who spoilt a row.
        fail: what to do with a request that fails.
    """

    def __init__(self, group: Group, decider: Decider, fail: Callable[[Live, Exception], None]) -> None:
        self.group, self.tree, self.pipeline = group, group.tree, group.pipeline
        self._decider, self._fail = decider, fail

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
                    self.group.prune(decision.held.pop(base))
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
                raise self._decider.blame(rows, row)
            if not stateful:
                continue
            for child in children.below.get(row, ()):
                if children.drop[child]:
                    continue
                states, token = self._decider.states(rows, children, child), children.token[child]
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
            elif drafts is not None:
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
                tree.release(before.node)
        live.branches = after
        for row in rows:  # drafts under a dead row: nobody holds them
            drafts = decision.held.pop(decision.rows.node[row], None)
            if drafts is not None and not any(b.held and b.held.drafts is drafts for b in after):
                self.group.prune(drafts)
        accepted = {branch for child, branch in grown if self.group.ran(branch.node) and children.may_go_on(child)}
        goes_on = self.pipeline.row_local or len(accepted) == len(after)
        for branch in accepted:
            draft = self.group.drafts.get(branch.node)
            if draft is None or draft.held:
                continue
            live.accepted += not draft.chosen
            live.counts.accepted += not draft.chosen
            draft.chosen, draft.gained = True, draft.gained or goes_on
        return [(live, branch) for branch in after if branch in accepted] if goes_on else []

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
        return Branch(node, stream, score or before.score, logprobs, states=states)

    def _logprobs_after(self, live: Live, before: Branch, children: Children, child: int) -> Logprobs:
        kind = live.request.logprobs
        if kind is None:
            return None
        values = children.model_logprob if kind == "model" else children.pipeline_logprob
        assert values is not None
        return before.logprobs, values[child]

    def _hold(self, live: Live, branch: Branch, drafts: dict[int, Draft]) -> None:
        readings = self.group.keep(branch.node)
        if any(other.held is not None and other.held.drafts is drafts for other in live.branches):
            drafts = dict(drafts)  # two branches on one node: each counts on the drafts
            for node in drafts:
                self.tree.hold(node)
        if branch.held is not None:
            self._let_go(branch.held.drafts)
        branch.held = Held(readings, drafts)
        for node, draft in drafts.items():
            if draft.kept is None and self.group.ran(node):
                draft.kept = self.group.keep(node)

    def _let_go(self, drafts: Iterable[int]) -> None:
        for node in reversed(list(drafts)):
            self.tree.release(node)
