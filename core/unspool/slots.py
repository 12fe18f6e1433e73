"""The pool of cache slots of one runner: who has which, kept contiguous where that is free.

A slot holds one token's keys and values. A holder claims a stretch when it is admitted and then takes slots from it in
order, so that its path is one segment, which attention reads as a view. A claim is a wish and no reservation: when
nothing else is left, slots in another's claim are taken too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Claim:
    """A stretch of slots that a holder would like to fill in order."""

    __slots__ = ("cursor", "end", "start", "written")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.cursor = self.written = start
        """Below `cursor` none of it is free; from `written` on none of it has ever been taken."""


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
        self._strayed: set[int] = set()
        """Slots that hold what somebody else wrote than their claim's holder."""

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
        if count:
            self._note(claim, range(start, end))
        self.free -= count
        return np.arange(start, end, dtype=np.int64)

    def take_one(self, claim: Claim) -> int:
        """Take one slot, the first of the claim that is free."""
        slot = self._taken.find(0, claim.cursor, claim.end)
        if slot < 0:
            return int(self.take(claim, 1)[0])
        self._taken[slot] = True
        claim.cursor = slot + 1
        if slot >= claim.written or self._strayed:
            self._note(claim, (slot,))
        self.free -= 1
        return slot

    def give(self, claim: Claim, slot: int) -> None:
        """Free one slot of the holder of `claim`."""
        assert self._taken[slot], "a slot is freed once"
        self._taken[slot] = False
        self.free += 1
        if claim.start <= slot < claim.cursor:
            claim.cursor = slot

    def give_all(self, slots: NDArray[np.int64]) -> None:
        """Free slots that are in nobody's claim any more."""
        assert self._used[slots].all(), "a slot is freed once"
        self._used[slots] = False
        self.free += len(slots)

    def unclaimed(self) -> int:
        """Count the free slots that nobody claims."""
        return self.size - int(np.count_nonzero(self._used | self._claimed))

    def wrote(self, claim: Claim, slots: NDArray[np.int64]) -> bool:
        """Tell whether it was the holder of `claim` who last took each of some slots, freed or not."""
        if not len(slots):
            return True
        inside = claim.start <= int(slots[0]) and int(slots[-1]) < claim.written  # they are ascending
        return inside and self._strayed.isdisjoint(slots.tolist() if self._strayed else ())

    def _note(self, claim: Claim, slots: Sequence[int]) -> None:
        """Note that the holder of a claim writes to slots of it, the highest of them last."""
        claim.written = max(claim.written, slots[-1] + 1)
        if self._strayed:
            self._strayed.difference_update(slots)

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
        own, strays = np.split(taken, [min(len(own), count)])
        if len(own):
            claim.cursor = max(claim.cursor, int(own[-1]) + 1)
            self._note(claim, own.tolist())
        self._strayed.update(strays.tolist())
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
