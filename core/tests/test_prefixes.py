"""Prompts that have run are kept: nobody runs the same beginning twice, and nobody can tell but by the counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unspool import schedule
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.prefixes import Kept, Prefix, Prefixes
from unspool.request import PreparedRequest, Result
from unspool.slots import SlotPool
from unspool_greedy import Greedy
from unspool_testing.compare import check_equal
from unspool_testing.driver import Circumstances, check_conservation, drive, plugin, request
from unspool_testing.hosts import Fails, Guidance, NarrowSearch
from unspool_testing.networks import tiny_model
from unspool_testing.runners import MisbehavingRunner
from unspool_testing.table import TableModel

VOCAB, SLOTS = 3, 24
GREEDY = Pipeline(plugin(Greedy))
PIPELINES = [GREEDY, Pipeline(plugin(NarrowSearch)), Pipeline(plugin(Greedy), [plugin(Guidance)])]
PROMPTS = st.lists(st.integers(0, 1), max_size=6).map(tuple)


def ids(tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(tokens, dtype=np.int64)


class AgainstAllBeginnings(RuleBasedStateMachine):
    """The tree beside a plain dict: each beginning that is known, its slot, who counts on it and when it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SLOTS)
        self.claim = self.pool.claim(0)
        self.tree = Prefixes(Kept(self.pool))
        self.slot: dict[tuple[int, ...], int] = {}
        self.used: dict[tuple[int, ...], int] = {}
        self.holders: list[tuple[Prefix, tuple[int, ...]]] = []
        self.clock = 0

    def users(self, path: tuple[int, ...]) -> int:
        return sum(held[: len(path)] == path for _, held in self.holders)

    def touch(self, path: tuple[int, ...]) -> None:
        self.clock += 1
        self.used |= {path[:length]: self.clock for length in range(1, len(path) + 1)}

    @rule(tokens=PROMPTS, idle=st.booleans())
    def borrow(self, tokens: tuple[int, ...], idle: bool) -> None:
        known = 0
        while known < len(tokens) and tokens[: known + 1] in self.slot and (idle or self.users(tokens[: known + 1])):
            known += 1
        assert not idle or self.tree.in_use(ids(tokens)) == sum(
            tokens[:length] in self.slot and self.users(tokens[:length]) > 0 for length in range(1, len(tokens) + 1)
        )
        prefix, slots = self.tree.borrow(self.tree.top, ids(tokens), idle=idle)
        assert slots.tolist() == [self.slot[tokens[:length]] for length in range(1, known + 1)]
        self.holders.append((prefix, tokens[:known]))
        self.touch(tokens[:known])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=PROMPTS.filter(bool))
    def give(self, data: st.DataObject, tokens: tuple[int, ...]) -> None:
        at = data.draw(st.integers(0, len(self.holders) - 1))
        prefix, path = self.holders[at]
        if len(tokens) > self.pool.free:
            return
        own = self.pool.take(self.claim, len(tokens))
        prefix, slots = self.tree.give(prefix, ids(tokens), own)
        for i, (ran, kept) in enumerate(zip(own.tolist(), slots.tolist(), strict=True), 1):
            if (known := (*path, *tokens[:i])) in self.slot:
                assert kept == self.slot[known]
                self.pool.give(self.claim, ran)
            else:
                assert kept == ran
                self.slot[known] = ran
        self.holders[at] = prefix, (*path, *tokens)
        self.touch((*path, *tokens))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        prefix, path = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.tree.release(prefix)
        self.touch(path)

    @rule(count=st.integers(1, 5))
    def give_up(self, count: int) -> None:
        self.tree.kept.give_up(count)
        for _ in range(count):
            ends = [p for p in self.slot if not self.users(p) and not any(q[:-1] == p for q in self.slot)]
            if ends:
                del self.slot[min(ends, key=self.used.__getitem__)]

    @invariant()
    def the_books_agree(self) -> None:
        kept, idle = self.tree.kept, sum(not self.users(path) for path in self.slot)
        assert (kept.held, kept.idle) == (len(self.slot), idle)
        assert self.pool.free == SLOTS - len(self.slot)
        found = {}
        stack: list[tuple[Prefix, tuple[int, ...]]] = [(self.tree.top, ())]
        while stack:
            above, path = stack.pop()
            for below in above.below.values():
                for length, slot in enumerate(below.slots.tolist(), 1):
                    found[(*path, *below.tokens[:length].tolist())] = slot
                stack.append((below, (*path, *below.tokens.tolist())))
        assert found == self.slot


AgainstAllBeginnings.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestTheTree = AgainstAllBeginnings.TestCase


def test_a_tree_that_is_dropped_frees_what_nobody_counts_on_and_is_found_no_more() -> None:
    pool = SlotPool(8)
    tree = Prefixes(Kept(pool))
    first, _ = tree.give(tree.top, ids([1, 2, 3]), pool.take(pool.claim(3), 3))
    second, _ = tree.give(tree.top, ids([4, 5]), pool.take(pool.claim(2), 2))
    tree.release(second)
    tree.drop()
    assert pool.free == 5 and not len(tree.borrow(tree.top, ids([1, 2, 3]))[1])
    first, _ = tree.give(first, ids([1]), pool.take(pool.claim(1), 1))
    tree.release(first)
    assert pool.free == 8 and tree.kept.held == tree.kept.idle == 0


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, schedule.WORTH_A_STEP])
def worth_a_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a single token too: prompts are short here."""
    monkeypatch.setattr(schedule, "WORTH_A_STEP", request.param)


def finish(loop: Loop) -> None:
    while loop.busy:
        loop.step()


def both_ways(runner: TableModel, asked: list[PreparedRequest], room: Circumstances) -> tuple[list[Result], int]:
    """Run requests with and without what is kept, compare, and count the tokens that were run with it."""
    without = drive(TableModel(VOCAB), asked, Circumstances(**{**vars(room), "prefix_cache": False}))
    got = drive(runner, asked, room)
    for i, (one, other) in enumerate(zip(without, got, strict=True)):
        assert other.stats.cached_tokens < max(1, other.stats.prompt_tokens)
        if i not in room.cancels:
            check_equal(one, other, f"request {i}")
    return got, runner.tokens


@pytest.mark.usefixtures("worth_a_step")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_kept_changes_no_text_whatever_happens(data: st.DataObject) -> None:
    stems = data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), min_size=1, max_size=2))
    count = data.draw(st.integers(1, 6))
    asked = []
    for seed in range(count):
        tail = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
        prompt = (*data.draw(st.sampled_from(stems)), *tail)
        pipeline = data.draw(st.sampled_from(PIPELINES))
        asked.append(
            request(pipeline, prompt, max_new_tokens=data.draw(st.integers(1, 5)), seed=seed, logprobs="model")
        )
    room = Circumstances(
        slots=data.draw(st.sampled_from([4096, 100, 70])),
        token_budget=data.draw(st.sampled_from([512, 9, 3])),
        max_running=data.draw(st.sampled_from([256, 3, 1])),
        arrivals=data.draw(st.lists(st.integers(0, 9), max_size=count)),
        cancels=data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 6), max_size=2)),
        preempts=data.draw(st.frozensets(st.integers(1, 12), max_size=3)),
    )
    both_ways(TableModel(VOCAB), asked, room)


@pytest.mark.parametrize("budget", [4096, 512, 100])
@pytest.mark.parametrize("arrivals", [[], list(range(0, 128, 2))])
def test_64_requests_pay_for_the_prompt_that_they_share_once(arrivals: list[int], budget: int) -> None:
    stem, new, many = tuple(i * i % VOCAB for i in range(1000)), 3, 64
    tails = [(*(i // VOCAB**place % VOCAB for place in range(4)), 1) for i in range(many)]
    asked = [request(GREEDY, (*stem, *tail), max_new_tokens=new, end_ids=(), seed=i) for i, tail in enumerate(tails)]
    table = TableModel(VOCAB)
    results = drive(table, asked, Circumstances(slots=4096, token_budget=budget, arrivals=arrivals))
    beginnings = {tail[:length] for tail in tails for length in range(1, 5)}
    least = len(stem) + len(beginnings) + many * new
    assert least <= table.tokens <= len(stem) + many * (5 + new - 1)
    assert sum(result.stats.rows for result in results) == table.tokens
    assert sum(result.stats.cached_tokens >= len(stem) for result in results) == many - 1
    assert not any(result.stats.preemptions for result in results), "64,000 slots are not needed"


def test_who_waits_does_not_hold_back_who_shares_nothing_and_goes_on_when_the_other_fails() -> None:
    stem = (1,) * 40
    fails = Pipeline(plugin(Greedy), [plugin(Fails, after=0)])
    asked = [
        request(fails, (*stem, 2)),
        request(GREEDY, (*stem, 0), max_new_tokens=2, end_ids=()),
        request(GREEDY, (2,) * 30, max_new_tokens=1, end_ids=()),
    ]
    for room in (Circumstances(), Circumstances(token_budget=32), Circumstances(cancels={0: 1}, token_budget=32)):
        table, steps = TableModel(VOCAB), list[int]()
        got = drive(table, asked, room, watch=lambda loop, steps=steps: steps.append(len(loop.scheduler.running)))  # type: ignore[misc]
        assert got[0].error is not None or 0 in room.cancels
        assert [len(result.token_ids) for result in got[1:]] == [2, 1]
        assert len(steps) <= 8
    got = drive(TableModel(VOCAB), asked, Circumstances())
    assert got[2].stats.queued_s <= got[1].stats.queued_s


def test_prompts_that_are_kept_never_stand_in_the_way() -> None:
    """A pool full of old prompts, and then requests that share nothing with them nor with each other."""
    old = [request(GREEDY, (0, *(i // VOCAB**k % VOCAB for k in range(9))), max_new_tokens=1) for i in range(20)]
    new = [request(GREEDY, (1 + i, *(2 - i,) * 12), max_new_tokens=9, end_ids=(), seed=i) for i in range(2)]
    preemptions = []
    for keeps in (True, False):
        ended: list[Result] = []
        loop = Loop(
            TableModel(VOCAB),
            40,
            prefix_cache=keeps,
            finished=lambda live, ended=ended: ended.append(live.result),  # type: ignore[misc]
        )
        for wave in (old, new):
            for one in wave:
                loop.submit(one)
            finish(loop)
        assert not any(result.error for result in ended)
        preemptions.append([result.stats.preemptions for result in ended])
        assert loop.main.cache.free == 40
    assert preemptions[0] == preemptions[1]


def test_what_fails_before_its_first_token_leaves_nothing_for_others() -> None:
    spoilt = MisbehavingRunner(TableModel(VOCAB), nan_after={2})
    asked = [request(GREEDY, (1,) * 20 + (2,)), request(GREEDY, (1,) * 20 + (0,), max_new_tokens=1)]
    nan, fine = drive(spoilt, asked, Circumstances(arrivals=[0, 9]))
    assert "NaN" in str(nan.error) and fine.error is None
    assert fine.stats.cached_tokens == 0
    proven = [asked[1], *asked]
    *_, fine = drive(spoilt, proven, Circumstances(arrivals=[0, 20, 30]))
    assert fine.stats.cached_tokens == 20, "another proved it before"


def test_a_pass_that_breaks_leaves_nothing_of_itself() -> None:
    broken = MisbehavingRunner(TableModel(VOCAB), raises=lambda number: number == 1)
    asked = [request(GREEDY, (1,) * 30, end_ids=(), seed=i) for i in range(2)]
    first, second = drive(broken, asked, Circumstances(token_budget=10, arrivals=[0, 5]))
    assert first.error is not None and second.error is None
    assert second.stats.cached_tokens == 0 and second.stats.rows == 30 + 7


def test_a_layer_that_is_wanted_later_is_not_missing_from_what_was_kept() -> None:
    loop = Loop(TableModel(VOCAB), 200)
    long = request(GREEDY, (1,) * 20, max_new_tokens=30, end_ids=())
    loop.submit(request(GREEDY, (2,) * 20, max_new_tokens=1))
    loop.submit(long)
    loop.step()
    before = loop.main.cache.kept.idle
    loop.main.cache.want([1])
    assert before > 0 and loop.main.cache.kept.idle == 0
    assert loop.main.new_to_others(ids([1] * 20)) == 20
    finish(loop)
    later = loop.submit(long)
    loop.step()
    assert later.counts.cached_tokens == 0
    finish(loop)
    check_conservation(loop)


def test_a_prompt_of_one_token_that_ran_before_a_layer_was_wanted_is_not_found_after() -> None:
    loop = Loop(TableModel(VOCAB), 20)
    loop.submit(request(GREEDY, (1,), max_new_tokens=2, end_ids=()))
    loop.step()
    loop.main.cache.want([1])
    finish(loop)
    assert loop.main.cache.kept.held == 0
    later = loop.submit(request(GREEDY, (1, 1), max_new_tokens=1))
    loop.step()
    assert later.counts.cached_tokens == 0


def test_without_it_nothing_is_kept() -> None:
    asked = [request(GREEDY, (1,) * 20, seed=i) for i in range(3)]
    results = drive(TableModel(VOCAB), asked, Circumstances(prefix_cache=False))
    assert [result.stats.cached_tokens for result in results] == [0, 0, 0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("budget", [512, 24])
def test_networks_say_the_same_after_prompts_that_others_ran(arch: str, budget: int) -> None:
    stem = tuple(3 + i * 7 % 50 for i in range(40))
    search = Pipeline(plugin(NarrowSearch))
    asked = [
        request(pipeline, (*stem[:cut], 5 + i, 9), max_new_tokens=6, end_ids=(), seed=i, logprobs="model")
        for i, (pipeline, cut) in enumerate([(GREEDY, 40), (search, 40), (GREEDY, 25), (search, 39), (GREEDY, 40)])
    ]
    results = {}
    for keeps in (True, False):
        room = Circumstances(
            token_budget=budget, arrivals=[0, 0, 3, 5, 30], preempts=frozenset({6}), prefix_cache=keeps
        )
        results[keeps] = drive(HuggingFaceRunner(tiny_model(arch)), asked, room)
    for one, other in zip(results[True], results[False], strict=True):
        for got, expected in zip(one.hypotheses, other.hypotheses, strict=True):
            assert got.token_ids == expected.token_ids
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-9)
    assert sum(result.stats.cached_tokens for result in results[True]) >= 40 + 25 + 39 + 40
