"""Law 5: nothing follows an end, and limits are exact, with and without drafts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests
from small_plugins import Sated

from unspool.pipeline import Pipeline
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_testing.compare import texts, with_pipeline, with_plugin
from unspool_testing.drafters import Recall
from unspool_testing.driver import drive, plugin, request
from unspool_testing.hosts import NarrowSearch
from unspool_testing.table import TableModel

VOCAB = 4
MADE = {name: make() for name, make in PIPELINES.items()}
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_text_stops_exactly_where_a_limit_says(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MADE)))
    one = data.draw(requests(MADE[name], VOCAB))
    if drafter := data.draw(st.sampled_from([None, "chains", "trees"])):
        one = with_pipeline(one, with_plugin(MADE[name], drafters(VOCAB)[drafter](data.draw(st.integers(0, 9)))))
    result = drive(TableModel(VOCAB), [one], models=MODELS)[0]
    if result.error is not None:
        assert type(result.error).__name__ == "DeadEnd"
        return
    ends, limits = set(one.end_ids), one.limits
    assert 1 <= len(result.hypotheses) <= one.n
    for h in result.hypotheses:
        assert not ends & set(h.token_ids[:-1]), "nothing follows an end"
        assert not ends & set(h.token_ids[: limits.min_new_tokens]), "no end below min_new_tokens"
        assert len(h.token_ids) <= limits.max_new_tokens
        if h.token_ids[-1] in ends:
            assert h.finish_reason == "eos"
        elif len(h.token_ids) == limits.max_new_tokens:
            assert h.finish_reason == "length"
        else:
            assert h.finish_reason in ("sated", "grammar_end")


@pytest.mark.parametrize("drafter", [None, "trees"])
def test_at_the_last_token_an_end_is_an_eos_and_all_else_is_length(drafter: str | None) -> None:
    model = TableModel(VOCAB, table={(): [0, 1, 0, 0], (1, 1): [5, 0, 0, 0]})
    pipeline = Pipeline(plugin(Greedy))
    pipeline = with_plugin(pipeline, drafters(VOCAB)[drafter](0)) if drafter else pipeline
    for most, expected in [(1, ((1,), "length")), (2, ((1, 0), "eos")), (3, ((1, 0), "eos"))]:
        assert texts(drive(model, [request(pipeline, (1,), max_new_tokens=most)])[0])[0] == expected
    assert texts(drive(model, [request(pipeline, (1,), max_new_tokens=4, min_new_tokens=2)])[0]) == [((1, 1, 0), "eos")]
    ends = request(pipeline, (1,), max_new_tokens=4, min_new_tokens=4)
    assert texts(drive(model, [ends])[0]) == [((1, 1, 1, 1), "length")]


def test_a_deadline_finishes_every_child_of_the_next_round() -> None:
    for strategy in (plugin(Greedy), plugin(Sample), plugin(NarrowSearch, width=3)):
        for drafter in (None, plugin(Recall, texts=((1, 1, 1), (2, 2, 2)))):
            pipeline = Pipeline(strategy, [drafter] if drafter else [])
            result = drive(TableModel(VOCAB), [request(pipeline, deadline=0.0, end_ids=(), n=2)])[0]
            assert [(len(h.token_ids), h.finish_reason) for h in result.hypotheses] == [(1, "deadline")] * 2


def test_the_first_finish_reason_stands() -> None:
    pipeline = Pipeline(plugin(Greedy), [plugin(Sated, "other", token=3), plugin(Sated, token=3)])
    model = TableModel(VOCAB, table={(): [0, 0, 0, 1]})
    for most, reason in [(2, "length"), (3, "sated")]:
        result = drive(model, [request(pipeline, max_new_tokens=most)])[0]
        assert texts(result) == [((3, 3), reason)]
    assert texts(drive(model, [request(pipeline, end_ids=(3,))])[0]) == [((3,), "eos")]


def test_a_word_of_a_plugin_cuts_acceptance() -> None:
    model = TableModel(VOCAB, table={(): [0, 0, 0, 1]})
    pipeline = Pipeline(plugin(Greedy), [plugin(Recall, texts=((3,) * 9,)), plugin(Sated)])
    result = drive(model, [request(pipeline, max_new_tokens=9, end_ids=())])[0]
    assert texts(result) == [((3, 3), "sated")]
    assert result.stats.forward_passes == 1


def test_a_search_that_drops_its_unfinished_children_has_ended() -> None:
    model = TableModel(VOCAB, table={(): [1, 0.5, 0, 0]})
    search = Pipeline(plugin(NarrowSearch, children=2, width=2, enough=2))
    result = drive(model, [request(search, n=4, max_new_tokens=9)])[0]
    assert [h.finish_reason for h in result.hypotheses] == ["eos"] * 2
    assert result.stats.forward_passes == 2
