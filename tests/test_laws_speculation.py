"""Law 3: any drafter, any strategy, any transforms, any seed: the same text as without it, and in no more passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests, slots_for

from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest
from unspool.runner import Batch, Output
from unspool_greedy import Greedy
from unspool_testing.compare import check_equal, check_speculation, circumstances, texts, with_pipeline, with_plugin
from unspool_testing.drafters import DraftModel, GuessChains, Recall
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.runners import CountingRunner
from unspool_testing.table import TableModel

VOCAB = 4
MADE = {name: make() for name, make in PIPELINES.items()}
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}
DRAFTERS = drafters(VOCAB)


def lawful(name: str, drafter: str) -> bool:
    strategy = MADE[name].strategy
    asks = drafter in ("draft model", "first layers", "itself")
    return not asks or (strategy.row_local and not strategy.holds)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_no_drafter_changes_a_text(name: str, drafter: str) -> None:
    if not lawful(name, drafter):
        with pytest.raises(ConfigError, match="cannot say what it would choose"):
            with_plugin(MADE[name], DRAFTERS[drafter](0))
        return

    @settings(max_examples=8, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        one = data.draw(requests(MADE[name], VOCAB))
        made = DRAFTERS[drafter](data.draw(st.integers(0, 20)))
        model = TableModel(VOCAB, seed=data.draw(st.integers(0, 3)), memory=data.draw(st.sampled_from([None, 1])))
        asked = with_pipeline(one, with_plugin(MADE[name], made))
        bad = data.draw(circumstances(1, slots_for(asked, name)))
        known = {made.name: Recall.Params(texts=said(model, one))} if isinstance(made, Recall) else {}
        check_speculation(model, one, MADE[name], asked.pipeline, bad, MODELS, **known)

    check()


def said(model: TableModel, one: PreparedRequest) -> tuple[tuple[int, ...], ...]:
    result = alone(model, [one], MODELS)[0]
    return tuple(h.token_ids for h in result.hypotheses)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_drafters_at_once_change_nothing(name: str) -> None:
    model = TableModel(VOCAB)
    for seed in range(3):
        one = request(MADE[name], (1, seed), seed=seed, n=2, logprobs="model")
        recall = plugin(Recall, texts=((0,), *said(model, one), (1, 1, 1, 1)))
        both = with_plugin(with_plugin(MADE[name], recall), DRAFTERS["trees"](seed))
        check_speculation(model, one, MADE[name], both, models=MODELS)


def test_a_drafter_that_is_always_right_saves_every_pass_but_one() -> None:
    model, greedy = TableModel(VOCAB), Pipeline(plugin(Greedy))
    one = request(greedy, (1, 2), max_new_tokens=8, end_ids=())
    knows = with_plugin(greedy, plugin(Recall, texts=said(model, one)))
    stats = check_speculation(model, one, greedy, knows).stats
    assert (stats.forward_passes, stats.drafted, stats.accepted) == (1, 7, 7)


def test_an_accepted_end_ends_the_text_there() -> None:
    model = TableModel(VOCAB, table={(): [0, 0, 0, 1], (3, 3): [5, 0, 0, 0], (0,): [0, 9, 0, 0]})
    greedy = Pipeline(plugin(Greedy))
    one = request(greedy, (1,), max_new_tokens=8)
    beyond = with_plugin(greedy, plugin(Recall, texts=((3, 3, 0, 1, 1, 1),)))
    result = check_speculation(model, one, greedy, beyond)
    assert texts(result) == [((3, 3, 0), "eos")]
    assert result.stats.drafted == 2, "nothing hangs below an end, and the end itself is not run"


@pytest.mark.parametrize("length", range(1, 9))
def test_drafts_never_overshoot_the_limit(length: int) -> None:
    model, greedy = TableModel(VOCAB), Pipeline(plugin(Greedy))
    free = said(model, request(greedy, (1, 2), max_new_tokens=20, end_ids=()))
    one = request(greedy, (1, 2), max_new_tokens=length, end_ids=())
    result = check_speculation(model, one, greedy, with_plugin(greedy, plugin(Recall, texts=free, length=20)))
    assert texts(result) == [(free[0][:length], "length")]
    assert result.stats.drafted == length - 1, "the last token is never run"


@pytest.mark.parametrize("name", ["greedy", "sample", "uniform", "mirostat"])
def test_a_draft_model_that_is_the_target_is_always_right(name: str) -> None:
    """`propose` is the pipeline's own choice, with the row's own noise."""
    model = TableModel(VOCAB)
    one = request(MADE[name], (1, 2), max_new_tokens=9, seed=7, end_ids=())
    result = check_speculation(model, one, MADE[name], with_plugin(MADE[name], plugin(DraftModel, length=3)))
    assert result.stats.drafted > 0
    if name != "mirostat":  # its transform reads log-probabilities, and is left out
        assert result.stats.accepted == result.stats.drafted


def test_a_draft_model_that_raises_once_is_asked_again_request_by_request() -> None:
    class RaisesOnce(CountingRunner):
        def forward(self, batch: Batch) -> Output:
            output = super().forward(batch)
            if len(self.batches) == 1:
                raise RuntimeError("out of memory, this time")
            return output

    model, plain = TableModel(VOCAB), MADE["sample"]
    drafting = with_plugin(plain, plugin(DraftModel, model="draft"))
    asked = [request(plain, (1, 2, i), seed=i) for i in range(3)]
    got = drive(model, [with_pipeline(one, drafting) for one in asked], models={"draft": RaisesOnce(model)})
    for one, result in zip(asked, got, strict=True):
        check_equal(alone(model, [one])[0], result)


def test_drafts_over_the_budget_are_deleted_the_deepest_first() -> None:
    model, greedy = TableModel(VOCAB), Pipeline(plugin(Greedy))
    asked = request(greedy, (1, 2), max_new_tokens=8, end_ids=())
    drafting = with_plugin(greedy, plugin(GuessChains, length=7, vocab_size=VOCAB))
    for budget in range(1, 9):
        counting = CountingRunner(TableModel(VOCAB))
        result = drive(counting, [with_pipeline(asked, drafting)], Circumstances(token_budget=budget))[0]
        check_equal(alone(model, [asked])[0], result)
        assert max(len(batch.token_ids) for batch in counting.batches) <= budget
