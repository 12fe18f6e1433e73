"""The pool of cache slots of one runner: who has which, kept contiguous where that is free.

A slot holds one token's keys and values. A holder claims a stretch when it is admitted and then takes slots from it in
order, so that its path is one segment, which attention reads as a view. A claim is a wish and no reservation: when
nothing else is left, slots in another's claim are taken too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Claim:
    """A stretch of slots that a holder would like to fill in order."""

    __slots__ = ("cursor", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.cursor = start, end, start


class SlotPool:
    """Which slots are free.

    Args:
        size: how many there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._taken = bytearray(size)  # one slot at a time is quicker there, many at once in the array over it
        self._used = np.frombuffer(self._taken, dtype=np.bool_)
        self._claimed = np.zeros(size, dtype=np.bool_)

    def claim(self, length: int) -> Claim:
        """Claim a free stretch of `length` slots, or the longest there is."""
        start, end = self._stretch(~(self._used | self._claimed), length)
        self._claimed[start:end] = True
        return Claim(start, end)

    def unclaim(self, claim: Claim) -> None:
        """Give a claim back. The slots taken from it are freed one by one."""
        self._claimed[claim.start : claim.end] = False

    def take(self, claim: Claim, count: int) -> NDArray[np.int64]:
        """Take `count` slots, those of the claim first. There must be so many free."""
        assert count <= self.free, "the scheduler made sure of the slots"
        start = claim.cursor
        end = start + count
        if end > claim.end or self._used[start:end].any():
            return self._take_scattered(claim, count)
        self._used[start:end] = True
        claim.cursor = end
        self.free -= count
        return np.arange(start, end, dtype=np.int64)

    def take_one(self, claim: Claim) -> int:
        """Take one slot, the next of the claim if that is free."""
        slot = claim.cursor
        if slot >= claim.end or self._taken[slot]:
            return int(self.take(claim, 1)[0])
        self._taken[slot] = True
        claim.cursor = slot + 1
        self.free -= 1
        return slot

    def give(self, claim: Claim, slot: int) -> None:
        """Free one slot of the holder of `claim`."""
        assert self._taken[slot], "a slot is freed once"
        self._taken[slot] = False
        self.free += 1
        cursor = claim.cursor
        while cursor > claim.start and not self._taken[cursor - 1]:
            cursor -= 1
        claim.cursor = cursor

    def _take_scattered(self, claim: Claim, count: int) -> NDArray[np.int64]:
        """Take what is left of the claim, then unclaimed slots, then any."""
        own = claim.start + np.flatnonzero(~self._used[claim.start : claim.end])
        free = ~self._used
        open_ = np.flatnonzero(free & ~self._claimed)
        others = free & self._claimed
        others[claim.start : claim.end] = False
        taken = np.concatenate([own, open_, np.flatnonzero(others)])[:count]
        self._used[taken] = True
        self.free -= count
        last = taken[(taken >= claim.start) & (taken < claim.end)]
        if len(last):
            claim.cursor = max(claim.cursor, int(last.max()) + 1)
        return taken.astype(np.int64)

    @staticmethod
    def _stretch(free: NDArray[np.bool_], length: int) -> tuple[int, int]:
        """Find the first stretch of True of `length`, or the longest one."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
        starts, ends = edges[::2], edges[1::2]
        if not len(starts):
            return 0, 0
        fits = np.flatnonzero(ends - starts >= length)
        best = int(fits[0]) if len(fits) else int(np.argmax(ends - starts))
        return int(starts[best]), int(min(ends[best], starts[best] + length))
