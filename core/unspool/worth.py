"""Which drafts are worth their rows, so that guessing never makes a busy batch slower.

A draft costs a row of the pass; if it is right, it saves its request a step. A drafter says how sure it is of a draft
(`step.draft(..., confidence=...)`); the core learns how often drafts of such confidence are right, and how long steps
take, and keeps the drafts with which the batch makes the most tokens a second:

    chance(draft)  =  product, along its path, of how often drafts of such confidence are right where they are reached
    kept           =  the k likeliest,   k = argmax over k of  (branches + their chances) / seconds(tokens + k)

At a small batch a step's time hardly grows with its tokens, and long guesses pay; at a large one each row costs what it
takes, and only near certainties do. None of this can change a text: what is chosen never depends on a draft
(docs/decisions/drafts-worth-their-rows.md).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from unspool.group import Draft, Group
    from unspool.lane import Lane
    from unspool.live import Live
    from unspool.schedule import Plan

HALVES = 2
"""Sizes that are told apart, in a doubling."""
KEPT = 7
"""Passes of a size that its time is the median of."""
FORGET_RARE, FORGET_KNOWN = 64, 512
"""Passes after which a size that did not come again is unknown: seen less than that, or more often."""
LEVELS = 8
"""How finely confidences are told apart: by the halvings of what is missing to certainty."""


class Pace:
    """Learns how long a pass over so many tokens takes: `level + shape[size]`, in logarithms.

    Of a size that it has not seen it thinks well, so that it is tried, and then known: below the smallest known size
    time is taken to fall with the tokens, beyond the largest not to rise until there are twice as many. A size is known
    when it has come twice, as the first pass of a new size takes longer than it ever will again.
    """

    def __init__(self) -> None:
        self._level = 0.0
        self._shape: dict[int, deque[float]] = {}
        """size -> the last passes of it, less the level that they were seen at."""
        self._last: dict[int, int] = {}
        self._passes = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a pass."""
        size, value = round(HALVES * math.log2(max(tokens, 1))), math.log(max(seconds, 1e-7))
        if not self._shape:
            self._level = value
        seen = self._shape.setdefault(size, deque(maxlen=KEPT))
        if len(seen) > 1:  # a hiccup of the machine moves the level only so much
            self._level += 0.3 * min(1.0, max(-1.0, value - self._level - statistics.median_low(seen)))
        seen.append(value - self._level)
        self._passes += 1
        self._last[size] = self._passes
        for other in [s for s, last in self._last.items() if self._is_stale(self._passes - last, len(self._shape[s]))]:
            del self._shape[other], self._last[other]

    def seconds(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Estimate the seconds of passes over so many tokens: `[n]` to `[n]`; all 1 as long as nothing is known."""
        known = {size: statistics.median_low(seen) for size, seen in self._shape.items() if len(seen) > 1}
        if not known:
            return np.ones(len(tokens))
        sizes = np.array(sorted(known), dtype=np.float64)
        logs = np.maximum.accumulate([self._level + known[int(size)] for size in sizes])
        at = HALVES * np.log2(np.maximum(tokens, 1))
        outside = np.minimum(0.0, at - sizes[0]) + np.maximum(0.0, at - sizes[-1] - HALVES)
        result: NDArray[np.float64] = np.exp(np.interp(at, sizes, logs) + outside * math.log(2) / HALVES)
        return result

    @staticmethod
    def _is_stale(age: int, seen: int) -> bool:
        return age > (FORGET_RARE if seen < KEPT else FORGET_KNOWN)


@dataclass(eq=False)
class Record:
    """How often drafts were right where they were reached, by their drafter and level of confidence.

    Args:
        keep: what an observation counts after the next one of its kind.
        fade: what it counts after a step without one.
    """

    keep: float
    fade: float
    counts: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def mean(self, key: tuple[str, int], prior: float) -> float:
        """Estimate how often such drafts are right; `prior` counts as much as two of them."""
        right, tried = self.counts.get(key, (0.0, 0.0))
        return (right + 2 * prior) / (tried + 2)

    def note(self, key: tuple[str, int], right: bool) -> None:
        """Take down one that was reached."""
        count = self.counts.setdefault(key, [0.0, 0.0])
        count[:] = count[0] * self.keep + right, count[1] * self.keep + 1

    def age(self) -> None:
        """Let a step pass."""
        for count in self.counts.values():
            count[:] = count[0] * self.fade, count[1] * self.fade


class Worth:
    """Says which drafts are worth their rows."""

    def __init__(self) -> None:
        self._pace: dict[Lane | None, Pace] = {}
        """Of whole steps (None), and of the passes of companions that are asked."""
        self._record = Record(keep=0.998, fade=0.9998)
        self._branches = self._tokens = 0
        self._groups: Sequence[Group] = ()
        self._spent = 0.0

    def begin(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Begin a step, before drafts are hung."""
        self._branches = sum(len(live.branches) for live in plan.ready)
        self._tokens, self._groups, self._spent = plan.tokens, groups, 0.0

    def keep_the_best(self) -> None:
        """Delete the drafts that are not worth their rows, of all groups."""
        uncertain = [(chance, group, node) for group in self._groups for node, chance in self._chances(group).items()]
        if not uncertain:
            return
        uncertain.sort(key=lambda one: (-one[0], one[1].tree.length[one[2]]))  # so none stands before its parent
        chances = np.cumsum([0.0, *(chance for chance, _, _ in uncertain)])
        tokens = self._tokens + self._fixed() + np.arange(len(chances))
        rate = (self._branches + chances) / (self._seconds(None, tokens) + self._spent)
        for _, group, node in reversed(uncertain[int(rate.argmax()) :]):
            group.forget(node)

    def pays(
        self, group: Group, plugin: str, nodes: Sequence[int], confidence: Sequence[float], lane: Lane | None
    ) -> bool:
        """Tell whether one more draft below each of `nodes` is likely to save more time than it takes.

        Args:
            group: whose drafts they would be.
            plugin: who would hang them.
            nodes: of rows, or of drafts that hang already; -1 stands for none.
            confidence: of each.
            lane: that of a companion which must run the nodes first.
        """
        chances = {node: chance for each in self._groups for node, chance in self._chances(each).items()}
        more = [
            self._chance(live, plugin, sure) * chances.get(node, 1.0)
            for node, sure in zip(nodes, confidence, strict=True)
            if (live := group.live_of(node)) is not None
        ]
        if not more:
            return False
        there = self._tokens + self._fixed() + len(chances)
        before, after = self._seconds(None, np.array([there, there + len(more)])) + self._spent
        if lane is not None:
            after += float(self._seconds(lane, np.array([len(more)]))[0])
        tokens = self._branches + sum(chances.values())
        return bool((tokens + sum(more)) / after > tokens / before)

    def asked(self, lane: Lane, tokens: int, seconds: float) -> None:
        """Learn from a pass of a companion that was asked."""
        self._pace.setdefault(lane, Pace()).observe(tokens, seconds)
        self._spent += seconds

    def learn(self, plan: Plan, seconds: float) -> None:
        """Learn from the step: from what was accepted, and from how long it took."""
        self._record.age()
        for group in self._groups:
            for live in group.lives:
                live.record.age()
            for node, draft in group.drafts.items():
                if draft.runs and not draft.held:
                    depth = group.tree.length[node] - group.tree.length[draft.base]
                    draft.live.counts.note_draft(_name(draft), depth, draft.chosen)
                if draft.runs and draft.confidence is not None and self._was_reached(group, draft):
                    key = _key(_name(draft), draft.confidence)
                    for record in (self._record, draft.live.record):
                        record.note(key, draft.gained)
        if not plan.prompts and self._branches:
            guesses = sum(draft.runs and not draft.held for group in self._groups for draft in group.drafts.values())
            self._pace.setdefault(None, Pace()).observe(self._tokens + guesses, seconds)
        self._groups = ()

    def _was_reached(self, group: Group, draft: Draft) -> bool:
        parent = group.drafts.get(draft.parent)
        return parent is None or parent.gained

    def _seconds(self, lane: Lane | None, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        pace = self._pace.get(lane)
        return pace.seconds(tokens) if pace else np.full(len(tokens), 0.0 if lane else 1.0)

    def _fixed(self) -> int:
        """Count the drafts of this step that are run whatever they cost."""
        return sum(
            draft.runs and draft.confidence is None and not draft.held
            for group in self._groups
            for draft in group.drafts.values()
        )

    def _chances(self, group: Group) -> dict[int, float]:
        """Give the chance of each draft that may be deleted, parents first. Those that others hang below may not be."""
        pinned: set[int] = set()
        for draft in group.drafts.values():
            if draft.confidence is None and draft.parent in group.drafts:
                pinned.update(_ancestry(group, draft.parent))
        chances: dict[int, float] = {}
        for node, draft in group.drafts.items():
            if draft.confidence is not None and draft.runs and node not in pinned:
                chances[node] = self._chance(draft.live, _name(draft), draft.confidence) * chances.get(
                    draft.parent, 1.0
                )
        return chances

    def _chance(self, live: Live, plugin: str, confidence: float) -> float:
        key = _key(plugin, confidence)
        return live.record.mean(key, self._record.mean(key, confidence))


def _key(plugin: str, confidence: float) -> tuple[str, int]:
    return plugin, min(LEVELS - 1, int(-math.log2(max(1 - confidence, 2.0**-LEVELS))))


def _name(draft: Draft) -> str:
    return draft.plugin.name if draft.plugin else ""


def _ancestry(group: Group, node: int) -> Iterable[int]:
    while node in group.drafts:
        yield node
        node = group.drafts[node].parent
