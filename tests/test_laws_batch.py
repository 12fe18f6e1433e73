"""Law 1: a request's output does not depend on what else is in the batch, on arrival, on slots, or on preemption."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests, slots_for

from unspool.loop import Loop
from unspool_testing.compare import check_batch, check_equal, circumstances, with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, drive, least_slots, request
from unspool_testing.table import TableModel

VOCAB = 5
MADE = {name: make() for name, make in PIPELINES.items()}
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}


@settings(max_examples=70, deadline=None)
@given(st.data())
def test_a_request_gives_what_it_gives_alone_whatever_the_circumstances(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(MADE)), min_size=1, max_size=5), "pipelines")
    asked = [data.draw(requests(MADE[name], VOCAB)) for name in names]
    least = max(slots_for(one, name) for one, name in zip(asked, names, strict=True))
    model = TableModel(VOCAB, seed=data.draw(st.integers(0, 3)), memory=data.draw(st.sampled_from([None, 2])))
    check_batch(model, asked, data.draw(circumstances(len(asked), least)), MODELS)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drafters_among_others_change_nothing_whatever_the_circumstances(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(MADE)), min_size=1, max_size=4), "pipelines")
    plain, drafting = [], []
    for name in names:
        one = data.draw(requests(MADE[name], VOCAB))
        strategy = MADE[name].strategy
        able = [d for d in drafters(VOCAB) if (strategy.row_local and not strategy.holds) or d in ("chains", "trees")]
        drafter = drafters(VOCAB)[data.draw(st.sampled_from(able), "drafter")](data.draw(st.integers(0, 9)))
        plain.append(one)
        drafting.append(with_pipeline(one, with_plugin(MADE[name], drafter)))
    least = max(slots_for(one, name) for one, name in zip(drafting, names, strict=True))
    model = TableModel(VOCAB, memory=2)
    got = drive(model, drafting, data.draw(circumstances(len(names), least)), MODELS)
    for one, result in zip(plain, got, strict=True):
        check_equal(drive(model, [one], models=MODELS)[0], result, f"{one.pipeline}")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_request_that_loses_its_slots_at_any_step_gives_the_same(name: str) -> None:
    model = TableModel(VOCAB)
    asked = [
        request(MADE[name], (1, 2, i), max_new_tokens=6, seed=i, n=2, logprobs="pipeline", end_ids=()) for i in range(2)
    ]
    for preempts in [{1}, {2}, {3}, {4}, {2, 3}, {1, 3, 5}, set(range(1, 40, 2))]:
        check_batch(model, asked, Circumstances(preempts=frozenset(preempts), token_budget=7), MODELS)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_requests_in_a_pool_for_one_take_turns_and_give_the_same(name: str) -> None:
    model = TableModel(VOCAB)
    asked = [request(MADE[name], (1, 2, 3, i), max_new_tokens=7, seed=i, n=2, end_ids=()) for i in range(4)]
    for spare in (0, 1, 3, 10):
        slots = max(slots_for(one, name) for one in asked) + spare
        check_batch(model, asked, Circumstances(slots=slots), MODELS)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_request_that_is_run_again_needs_no_more_slots_than_before(name: str) -> None:
    model = TableModel(VOCAB)
    asked = [request(MADE[name], (1, 2), max_new_tokens=5, n=2, end_ids=())]
    slots = least_slots(model, asked, MODELS)
    for step in range(1, 9):
        check_batch(model, asked, Circumstances(slots=slots, preempts=frozenset({step})), MODELS)


def test_drafts_of_one_strategy_leave_the_slots_that_others_companions_need() -> None:
    model = TableModel(VOCAB)
    asked = [
        request(MADE["layers"], (1, 2), max_new_tokens=4, end_ids=()),
        request(MADE["impatient"], (0, 0), max_new_tokens=4, n=2, end_ids=()),
    ]
    for slots in range(18, 24):
        check_batch(model, asked, Circumstances(slots=slots, arrivals=(0, 1)), MODELS)


def test_64_requests_of_8_pipelines_in_one_batch_each_give_what_they_give_alone() -> None:
    names = ["greedy", "sample", "uniform", "mirostat", "grammar", "guidance", "search", "choice, grammar"]
    chance, model = random.Random(0), TableModel(VOCAB)
    asked = [
        request(
            MADE[names[i % 8]],
            [chance.randrange(VOCAB) for _ in range(chance.randint(1, 9))],
            max_new_tokens=chance.randint(1, 10),
            seed=chance.randrange(2**63),
            n=chance.randint(1, 3),
        )
        for i in range(64)
    ]
    together = []

    def watch(loop: Loop) -> None:
        together.append(len(loop.scheduler.running))

    got = drive(model, asked, Circumstances(), MODELS, watch)
    assert together[0] > 32, "they do run in one batch"
    for one, result in zip(asked, got, strict=True):
        check_equal(drive(model, [one], models=MODELS)[0], result, f"{one.pipeline}")
    check_batch(model, asked, Circumstances(slots=150, token_budget=20, arrivals=[i // 4 for i in range(64)]), MODELS)
