"""The rounds of a step: decide (`decide.py`), grow (`grow.py`), until nobody goes on.

Where every plugin is `row_local` all rounds are held at once: the result is the same, sooner.
"""

from __future__ import annotations

from collections.abc import Callable

from unspool.decide import Decider, Decision, reason_of
from unspool.errors import PluginError, UnspoolError
from unspool.group import Group
from unspool.grow import Grower, Standing
from unspool.live import Branch, Live
from unspool.step import Rows
from unspool.stop_text import StopText


class Rounds:
    """All rounds of one group in one step.

    Args:
        group: the requests, with the readings of the pass.
        fail: what to do with a request that fails.
        stop_text: finds stop strings in the text of paths.
    """

    def __init__(self, group: Group, fail: Callable[[Live, Exception], None], stop_text: StopText) -> None:
        self.group, self.pipeline = group, group.pipeline
        self.decider = Decider(group, stop_text)
        self.grower = Grower(group, self.decider, fail)
        self._fail = fail

    def run(self) -> None:
        """Hold rounds until nothing goes on."""
        for live in self.group.lives:
            live.accepted = 0
        standing, round_ = [(live, branch) for live in self.group.lives for branch in live.branches], 0
        if self.pipeline.looks_ahead and self.group.drafts and (left := self._run_ahead()) is not None:
            standing, round_ = left, 1
        while standing:
            following: list[Standing] = []
            for decision in self._decisions(Rows.of(standing), round_):
                following += self.grower.grow(decision, range(len(decision.rows)))
            standing, round_ = following, round_ + 1

    def _run_ahead(self) -> list[Standing] | None:
        """Hold all rounds at once: one row for each branch on each draft below it, then walk.

        Returns:
            Branches that were accepted in streams that were not there before: they had no rows. None: it cannot be.
        """
        group, parent = self.group, self.group.tree.parent
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
            decision = self.decider.decide(Rows.at(table), looks_ahead=True)
        except Exception:  # any fault may stand on a row that will turn out not to exist
            return None
        left: list[Standing] = []
        while start:
            following, start = self.grower.grow(decision, start), []
            for live, branch in following:
                row = place.get((live, branch.stream, branch.node))
                if row is None:
                    left.append((live, branch))
                else:
                    start.append(row)
        return [(live, branch) for live, branch in left if live.result is None]  # it may have failed further on

    def _decisions(self, rows: Rows, round_: int) -> list[Decision]:
        """Decide for all requests together; if a hook raises, for each alone, so that only those that fail fail."""
        try:
            return [self.decider.decide(rows, round_)]
        except Exception:
            self.group.unhold()
        decisions = []
        for part in rows.by_request():
            try:
                decisions.append(self.decider.decide(part, round_, one_by_one=True))
            except Exception as error:
                self.group.unhold()
                strategy = self.pipeline.strategy.name
                fault = error if isinstance(error, UnspoolError) else PluginError(strategy, "select", reason_of(error))
                self._fail(part.lives[0], fault)
        return decisions
