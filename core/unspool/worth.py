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
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unspool.group import Draft, Group
    from unspool.lane import Lane
    from unspool.live import Live
    from unspool.plugin import Plugin
    from unspool.schedule import Plan

ALIKE = (1, 8, 64)
"""Passes of up to so many tokens are taken to run the same code: a single token, a handful, more of them, and many."""
KEEP = 0.98
"""What a pass counts after the next one of its band."""
FOLLOW, STARTLED = 0.1, 0.3
"""How much of an unexpected time (in logarithms) is put down to the machine, and how much of it is believed at most."""
HANDFUL = 16.0
"""Passes of up to so many tokens are thought to take the same before anything is known."""
DOUBT = 4.0
"""Squares of tokens apart that passes must have been before a slope which they show is believed as much as a guess."""
FORGET = 1024
"""Passes after which a band that did not come again is unknown."""
MARGIN = 0.02
"""By how much drafts must seem to make the batch faster: what is chosen for its estimate is rarely as good."""
AHEAD, LEAST = (1, 2, 4, 8, 16, 32, 64), 0.02
"""So many drafts are weighed to tell what one takes where it takes least. None is worth less of a token."""
TRIAL, REST, MOST_REST = 16, 32, 256
"""Steps after which it is asked whether drafts have paid, and the fewest and most for which they rest if not."""
PATIENCE = 0.25
"""What they may lose before, of a step; or a token of one branch, if that takes longer."""
TRUST, PRIOR = 0.99, 16.0
"""What a draft counts a step later when it is asked how many come true, and for how many this is believed at first."""
LEVELS = 8
"""How finely confidences are told apart: by the halvings of what is missing to certainty."""


class Pace:
    """Learns how long a pass over so many tokens takes: a line in each band of `ALIKE`, times the pace of the machine.

    Where another code runs, a token more may cost half a pass; within a band each costs about the same. Of a band that
    it has not seen it thinks well, so that it is tried, and then known: below the smallest known band time is taken to
    fall with the tokens, beyond a known one to rise with them, but for the first two or the first quarter. The first
    pass of a band says nothing: it takes longer than it ever will again.
    """

    def __init__(self) -> None:
        self._level = 0.0
        self._lines: dict[int, Line] = {}
        self._last: dict[int, int] = {}
        self._passes = 0

    @property
    def known(self) -> list[int]:
        """List the bands of which something is known."""
        return sorted(band for band, line in self._lines.items() if line.seen > 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a pass."""
        tokens = max(tokens, 1)  # there may be none: all that is read has run already
        band, value = bisect_left(ALIKE, tokens), math.log(max(seconds, 1e-7))
        if not self._lines:
            self._level = value
        line = self._lines.setdefault(band, Line())
        if line.seen > 1:  # a hiccup of the machine moves the level only so much
            expected = self._level + math.log(line.at(tokens))
            value = expected + min(STARTLED, max(-STARTLED, value - expected))
            self._level += FOLLOW * (value - expected)
        line.observe(tokens, math.exp(value - self._level))
        self._passes += 1
        self._last[band] = self._passes
        for other in [band for band, last in self._last.items() if self._passes - last > FORGET]:
            del self._lines[other], self._last[other]

    def seconds(self, tokens: Sequence[int]) -> list[float]:
        """Estimate the seconds of passes over so many tokens, ascending: a number for each.

        While nothing is known they are told in passes of the first, not in seconds.
        """
        known, tokens = self.known, [max(count, 1) for count in tokens]
        if not known:
            alike = max(HANDFUL, _free(tokens[0]))
            return [max(1.0, count / alike) for count in tokens]
        times, level = list[float](), math.exp(self._level)
        ends = [*(bisect_right(tokens, most) for most in ALIKE), len(tokens)]
        for band, (begin, end) in enumerate(pairwise([0, *ends])):
            if begin == end:
                continue
            own, at = tokens[begin:end], bisect_right(known, band) - 1
            line = self._lines[known[max(at, 0)]]
            if at < 0:
                first = ALIKE[known[0] - 1] + 1
                each = line.at(first) * level / first
                times += [each * count for count in own]
            elif known[at] == band:
                flat, rise = line.at(0) * level, line.slope * level
                times += [flat + rise * count for count in own]
            else:
                alike, flat = _free(line.middle), line.at(line.middle) * level
                times += [flat * max(1.0, count / alike) for count in own]
        return list(accumulate(times, max))


def _free(tokens: float) -> float:
    """Say up to how many tokens a pass is thought to take what one of `tokens` does, where nothing is known of it."""
    return tokens + max(2.0, tokens / 4)


UNKNOWN = Pace()
"""Of a lane that has not run."""


class Line:
    """How time grows with tokens in a band: the straight line through what was seen there that is nearest to it.

    It neither falls nor rises faster than in proportion, and is thought to rise half as fast before passes of several
    sizes were seen.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, time: float) -> None:
        """Learn from a pass. The first one only counts as seen."""
        self.seen += 1
        if self.seen > 1:
            self._weight, self._x, self._y = KEEP * self._weight + 1, KEEP * self._x + tokens, KEEP * self._y + time
            self._xx, self._xy = KEEP * self._xx + tokens * tokens, KEEP * self._xy + tokens * time

    @property
    def middle(self) -> float:
        """Say of how many tokens its passes were, on average."""
        return self._x / self._weight

    @property
    def slope(self) -> float:
        """Say what a token more takes."""
        x, y = self.middle, self._y / self._weight
        steepest = y / x
        slope = (self._xy - self._x * y + DOUBT * steepest / 2) / (self._xx - self._x * x + DOUBT)
        return min(max(slope, 0.0), steepest)

    def at(self, tokens: float) -> float:
        """Give the time at so many tokens."""
        return self._y / self._weight + self.slope * (tokens - self.middle)


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


@dataclass(eq=False)
class Trial:
    """Whether drafts have paid of late: what they saved, less what they and looking for them took.

    A trial ends after so many steps, or sooner if more was lost than one bears. After a trial that they lost they rest,
    twice as long after each that they lose again; and less by the share of requests that came since, whose texts may
    be others.
    """

    saved: float = 0.0
    left: int = TRIAL
    rest: int = 0
    """Steps for which they rest from now on."""
    next_rest: int = REST

    def renew(self, share: float) -> None:
        """Take less account of what was lost: `share` of the requests, of 1, have not been tried."""
        self.rest = int(self.rest * (1 - share))
        self.next_rest = max(REST, int(self.next_rest * (1 - share)))

    def note(self, saved: float, patience: float) -> None:
        """Take down the seconds that a step of it saved; they are negative if it was in vain.

        Args:
            saved: the seconds.
            patience: seconds that may be lost before a trial ends early.
        """
        self.saved += saved
        self.left -= 1
        if not self.left or self.saved < -patience:
            lost = self.saved < 0
            self.rest = self.next_rest if lost else 0
            self.next_rest = min(2 * self.next_rest, MOST_REST) if lost else REST
            self.saved, self.left = 0.0, TRIAL


class Worth:
    """Says which drafts are worth their rows."""

    def __init__(self) -> None:
        self._trials: dict[int, Trial] = {}
        """By the doublings of the number of branches."""
        self._pace: dict[Lane | None, Pace] = {}
        """Of whole steps (None), and of the passes of companions that are asked."""
        self._record = Record(keep=0.998, fade=0.9998)
        self._hoped = self._came = 0.0
        """Sums of the chances of drafts that were run of late, and how many of those were right."""
        self._branches = self._tokens = self._prompts = 0
        self._latest = -1
        """The last request that was seen."""
        self._groups: Sequence[Group] = ()
        self._spent = 0.0
        self.least = LEAST
        """The chance below which a draft is not worth its row, whatever else is drafted: it need not be hung."""

    @property
    def rests(self) -> bool:
        """Tell whether no draft is taken in this step, since they did not pay of late."""
        return self.least > 1

    def takes(self, live: Live, plugin: Plugin | None, confidence: float) -> bool:
        """Tell whether a draft of such confidence would be taken below a row."""
        return not self.rests and self.chance(live, plugin, confidence) >= self.least

    def begin(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Begin a step, before drafts are hung."""
        self._branches = sum(len(live.branches) for live in plan.ready)
        self._tokens, self._prompts = plan.tokens, plan.prompts
        self._groups, self._spent = groups, 0.0
        trial = self._trial
        if fresh := sum(live.order > self._latest for live in plan.ready):
            trial.renew(fresh / len(plan.ready))
            self._latest = max(live.order for live in plan.ready)
        if trial.rest:
            trial.rest -= 1
            self.least = math.inf
            return
        drafts = _ahead(plan.tokens)
        without, *with_them = self._step_seconds([0, *drafts])
        each = min((seconds - without) / more for more, seconds in zip(drafts, with_them, strict=True))
        self.least = max(LEAST, self._branches / without * each)

    def keep_the_best(self) -> None:
        """Delete the drafts that are not worth their rows, of all groups."""
        uncertain = [(chance, group, node) for group in self._groups for node, chance in self._chances(group).items()]
        if not uncertain:
            return
        uncertain.sort(key=lambda one: (-one[0], one[1].tree.length[one[2]]))  # so none stands before its parent
        chances, fixed = list(accumulate((chance for chance, _, _ in uncertain), initial=0.0)), self._fixed()
        times = self._step_seconds(range(fixed, fixed + len(chances)))
        rate = [
            (self._branches + self._trust * chance) / (seconds + self._spent)
            for chance, seconds in zip(chances, times, strict=True)
        ]
        best = max(range(len(rate)), key=rate.__getitem__)
        for _, group, node in reversed(uncertain[best if rate[best] > (1 + MARGIN) * rate[0] else 0 :]):
            group.forget(node)

    def pays(
        self, group: Group, plugin: Plugin, nodes: Sequence[int], confidence: Sequence[float], lane: Lane | None
    ) -> bool:
        """Tell whether one more draft below each of `nodes` is likely to save more time than it takes.

        Args:
            group: whose drafts they would be.
            plugin: who would hang them.
            nodes: of rows, or of drafts that hang already; -1 stands for none.
            confidence: of each.
            lane: that of a companion which must run the nodes first.
        """
        if self.rests:
            return False
        chances = {node: chance for each in self._groups for node, chance in self._chances(each).items()}
        more = [
            self.chance(live, plugin, sure) * chances.get(node, 1.0)
            for node, sure in zip(nodes, confidence, strict=True)
            if (live := group.live_of(node)) is not None
        ]
        if not more:
            return False
        there = self._fixed() + len(chances)
        before, after = (seconds + self._spent for seconds in self._step_seconds([there, there + len(more)]))
        if lane is not None:
            after += self._seconds(lane, [len(more)])[0]
        tokens = self._branches + self._trust * sum(chances.values())
        return (tokens + self._trust * sum(more)) / after > tokens / before

    def asked(self, lane: Lane, tokens: int, seconds: float) -> None:
        """Learn from a pass of a companion that was asked."""
        self._pace.setdefault(lane, Pace()).observe(tokens, seconds)
        self._spent += seconds

    def learn(self, plan: Plan, drafting: float, seconds: float) -> None:
        """Learn from the step: from what was accepted, and from how long it took.

        Args:
            plan: what ran.
            drafting: seconds in which drafts were hung.
            seconds: of the pass, and of all that came after it.
        """
        self._record.age()
        self._hoped, self._came = TRUST * self._hoped, TRUST * self._came
        guesses = gained = 0
        for group in self._groups:
            for live in group.lives:
                live.record.age()
            for node, draft in group.drafts.items():
                if draft.runs and not draft.held:
                    depth = group.tree.length[node] - group.tree.length[draft.base]
                    draft.live.counts.note_draft(_name(draft), depth, draft.chosen)
                guesses += draft.runs and not draft.held
                gained += draft.gained and draft.confidence is not None
                if draft.runs and draft.confidence is not None:
                    self._hoped, self._came = self._hoped + draft.chance, self._came + draft.gained
                if draft.runs and draft.confidence is not None and self._was_reached(group, draft):
                    key = _key(_name(draft), draft.confidence)
                    for record in (self._record, draft.live.record):
                        record.note(key, draft.gained)
        if self._branches and (not plan.prompts or plan.tokens > ALIKE[-1]):
            self._pace.setdefault(None, Pace()).observe(self._tokens + guesses, seconds)
        if self._branches and not self.rests:
            without, with_them = self._step_seconds([self._fixed(), guesses])
            token = without / self._branches
            saved = gained * token - (with_them - without) - drafting
            if not self._pace.get(None, UNKNOWN).known:
                saved = 0.0  # these are no seconds
            self._trial.note(saved, max(PATIENCE * without, token))
        self._groups = ()

    def _was_reached(self, group: Group, draft: Draft) -> bool:
        parent = group.drafts.get(draft.parent)
        return parent is None or parent.gained

    def _seconds(self, lane: Lane | None, tokens: Sequence[int]) -> list[float]:
        pace = self._pace.get(lane, UNKNOWN)
        return [0.0] * len(tokens) if lane and not pace.known else pace.seconds(tokens)

    def _step_seconds(self, drafts: Sequence[int]) -> list[float]:
        """Estimate the seconds of this step with so many drafts, ascending: a number for each.

        Prompts that run in it take what they take, and are not counted; but a draft beside long ones costs what each of
        their tokens does.
        """
        tokens = [self._tokens + more for more in drafts]
        if not self._prompts:
            return self._seconds(None, tokens)
        before = max(self._tokens - self._prompts, 1), self._tokens
        alone, whole, *seconds = self._seconds(None, [*before, *tokens])
        if self._tokens > ALIKE[-1]:
            return [alone + more * whole / self._tokens for more in drafts]
        return [alone + each - whole for each in seconds]

    @property
    def _trust(self) -> float:
        """Say what of the chances comes true: the likeliest of many are rarely as likely as they seem."""
        return min(1.0, (self._came + PRIOR) / (self._hoped + PRIOR))

    @property
    def _trial(self) -> Trial:
        return self._trials.setdefault((self._branches - 1).bit_length(), Trial())

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
        return {
            node: draft.chance
            for node, draft in group.drafts.items()
            if draft.confidence is not None and draft.runs and node not in pinned
        }

    def chance(self, live: Live, plugin: Plugin | None, confidence: float) -> float:
        """Estimate how often a draft of such confidence is right where it is reached."""
        key = _key(plugin.name if plugin else "", confidence)
        return live.record.mean(key, self._record.mean(key, confidence))


def _ahead(tokens: int) -> list[int]:
    """List the numbers of drafts of which one may take least: some, and those that fill a band."""
    return sorted({*AHEAD, *(most - tokens for most in ALIKE if 0 < most - tokens < AHEAD[-1])})


def _key(plugin: str, confidence: float) -> tuple[str, int]:
    return plugin, min(LEVELS - 1, int(-math.log2(max(1 - confidence, 2.0**-LEVELS))))


def _name(draft: Draft) -> str:
    return draft.plugin.name if draft.plugin else ""


def _ancestry(group: Group, node: int) -> Iterable[int]:
    while node in group.drafts:
        yield node
        node = group.drafts[node].parent
