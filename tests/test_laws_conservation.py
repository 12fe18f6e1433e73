"""Law 9: when a request ends, or fails, or is cancelled, all that it had is free. `drive` checks it after every run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests, slots_for
from small_plugins import Faulty, Ledger, Wall

from unspool.live import Live
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest
from unspool_greedy import Greedy
from unspool_testing.compare import check_equal, circumstances, texts, with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.table import TableModel

VOCAB = 4
MADE = {name: make() for name, make in PIPELINES.items()}
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}
TROUBLE = [
    plugin(Faulty, "raises", where="logits_transform", after=3),
    plugin(Faulty, "drafts badly", where="pre_forward", after=2),
    plugin(Faulty, "makes nan", makes="nan", after=2),
    plugin(Faulty, "stops badly", where="stop_check", after=1),
    plugin(Faulty, "folds badly", where="advance", after=2),
    plugin(Wall),
    plugin(Ledger, closes=False),
]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nothing_is_left_after_ends_failures_and_cancellations_in_any_order(data: st.DataObject) -> None:
    asked: list[PreparedRequest] = []
    least, cancels, fine = 1, {}, []
    for number in range(data.draw(st.integers(1, 5))):
        name = data.draw(st.sampled_from(sorted(MADE)))
        pipeline = MADE[name]
        one = data.draw(requests(pipeline, VOCAB))
        trouble = data.draw(st.sampled_from([None, None, *TROUBLE]))
        drafter = data.draw(st.sampled_from([None, "chains", "trees"]))
        pipeline = with_plugin(pipeline, trouble) if trouble else pipeline
        pipeline = with_plugin(pipeline, drafters(VOCAB)[drafter](number)) if drafter else pipeline
        asked.append(with_pipeline(one, pipeline))
        least = max(least, slots_for(asked[-1], name))
        if data.draw(st.booleans()):
            cancels[number] = data.draw(st.integers(0, 8))
        elif trouble is None:
            fine.append((number, one))
    where = data.draw(circumstances(len(asked), least))
    where = Circumstances(where.slots, where.token_budget, where.max_running, where.arrivals, cancels, where.preempts)
    got = drive(TableModel(VOCAB), asked, where, MODELS)
    for number, one in fine:
        check_equal(alone(TableModel(VOCAB), [one], MODELS)[0], got[number], f"{asked[number].pipeline}")


def test_a_request_that_fails_while_a_branch_of_it_waits_for_the_next_round_leaves_nothing() -> None:
    """A child in a new stream is accepted and waits for a round of its own; another branch is spoilt further on."""
    for seed in range(12):
        one = request(MADE["forks"], (1,), max_new_tokens=3, end_ids=(0,), seed=seed)
        pipeline = with_plugin(MADE["forks"], plugin(Faulty, "makes nan", makes="nan", after=2))
        drive(TableModel(VOCAB), [with_pipeline(one, with_plugin(pipeline, drafters(VOCAB)["chains"](0)))])


def test_a_cancelled_request_gives_its_branches_as_they_are_after_finished_ones() -> None:
    greedy = request(Pipeline(plugin(Greedy)), (1, 2), max_new_tokens=9, end_ids=())
    whole = alone(TableModel(VOCAB), [greedy])[0]
    for steps in range(9):
        result = drive(TableModel(VOCAB), [greedy], Circumstances(cancels={0: steps}))[0]
        assert texts(result) == [(whole.token_ids[:steps], "cancelled")]


def test_finished_texts_of_a_cancelled_search_are_ranked_before_unfinished_ones() -> None:
    model = TableModel(VOCAB, table={(): [1, 1.5, 0, 0]})
    search = request(MADE["search"], (1,), max_new_tokens=9, n=9)
    result = drive(model, [search], Circumstances(cancels={0: 3}))[0]
    reasons = [h.finish_reason for h in result.hypotheses]
    assert reasons == sorted(reasons, key=lambda reason: reason == "cancelled")
    assert "eos" in reasons and "cancelled" in reasons


def test_a_request_that_has_ended_can_be_cancelled_without_harm() -> None:
    ended: list[Live] = []
    loop = Loop(TableModel(VOCAB), 40, finished=ended.append)
    live = loop.submit(request(MADE["greedy"], (1,), max_new_tokens=2, end_ids=()))
    while loop.busy:
        loop.step()
    loop.cancel(live)
    assert len(ended) == 1 and len(loop.tree) == 0


def test_slots_are_free_again_while_the_others_still_run() -> None:
    used: list[int] = []
    asked = [request(MADE["greedy"], (1, 2), max_new_tokens=most, end_ids=()) for most in (2, 6)]
    drive(TableModel(VOCAB), asked, watch=lambda loop: used.append(loop.main.cache.pool.size - loop.main.cache.free))
    assert used == [3, 3, 4, 5, 6, 0], "the first one's slots are free as soon as it has ended"
