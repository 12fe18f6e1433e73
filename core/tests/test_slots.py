"""A slot has one holder; claims keep holders contiguous where that is free, and reserve nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unspool.slots import Claim, SlotPool


def test_a_holder_fills_its_claim_in_order_whatever_others_take_in_between() -> None:
    pool = SlotPool(20)
    one, other = pool.claim(8), pool.claim(8)
    assert pool.take(one, 3).tolist() == [0, 1, 2]
    assert pool.take(other, 2).tolist() == [8, 9]
    assert [pool.take_one(one), pool.take_one(one)] == [3, 4]


def test_a_claim_reserves_nothing() -> None:
    pool = SlotPool(10)
    pool.claim(10)
    late = pool.claim(4)
    assert len(set(pool.take(late, 10).tolist())) == 10
    assert pool.free == 0


def test_unclaimed_slots_are_taken_before_those_that_others_claim() -> None:
    pool = SlotPool(10)
    pool.claim(4)
    late = pool.claim(2)
    assert pool.take(late, 6).tolist() == [4, 5, 6, 7, 8, 9]


def test_a_slot_that_is_given_back_at_the_end_is_taken_again() -> None:
    pool = SlotPool(10)
    claim = pool.claim(6)
    pool.take(claim, 3)
    pool.give(claim, 2)
    assert pool.take(claim, 2).tolist() == [2, 3]


def test_a_slot_that_is_given_back_in_the_middle_is_the_next_to_be_taken() -> None:
    pool = SlotPool(10)
    claim = pool.claim(8)
    pool.take(claim, 6)
    for slot in (4, 2):
        pool.give(claim, slot)
    assert [pool.take_one(claim) for _ in range(4)] == [2, 4, 6, 7]


class PoolBesideASet(RuleBasedStateMachine):
    """A pool never gives a slot twice, and knows how many are free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(24)
        self.holders: list[tuple[Claim, set[int]]] = []
        self.writer: dict[int, Claim] = {}

    @rule(length=st.integers(1, 30))
    def claim(self, length: int) -> None:
        if len(self.holders) < 5:
            self.holders.append((self.pool.claim(length), set()))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        claim, mine = data.draw(st.sampled_from(self.holders))
        count = data.draw(st.integers(0, self.pool.free))
        if count == 1:
            taken = {self.pool.take_one(claim)}
        else:
            slots: np.ndarray[tuple[int], np.dtype[np.int64]] = self.pool.take(claim, count)
            taken = set(slots.tolist())
        assert len(taken) == count
        assert not any(taken & held for _, held in self.holders)
        mine |= taken
        self.writer.update(dict.fromkeys(taken, claim))

    @precondition(lambda self: any(held for _, held in self.holders))
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        claim, mine = data.draw(st.sampled_from([holder for holder in self.holders if holder[1]]))
        slot = data.draw(st.sampled_from(sorted(mine)))
        mine.remove(slot)
        self.pool.give(claim, slot)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        claim, mine = self.holders.pop(index)
        for slot in mine:
            self.pool.give(claim, slot)
        self.pool.unclaim(claim)

    @invariant()
    def counts_are_right(self) -> None:
        held = sum(len(held) for _, held in self.holders)
        assert self.pool.free == self.pool.size - held

    @invariant()
    def what_a_holder_is_said_to_have_written_nobody_else_wrote_after_it(self) -> None:
        for claim, _ in self.holders:
            for slot in range(self.pool.size):
                if self.pool.wrote(claim, np.array([slot])):
                    assert self.writer[slot] is claim


TestPoolBesideASet = PoolBesideASet.TestCase
TestPoolBesideASet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
