"""A plugin that goes wrong fails its own requests, by name; nobody else notices, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from small_plugins import BadStrategy, Faulty, Impatient, Ledger, Wall

from unspool.errors import AdmissionError, ConstraintError, DeadEnd, ModelError, PluginError
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.plugin import Companion, Plugin, hookimpl
from unspool.request import PreparedRequest, Result
from unspool.step import Step
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_testing.compare import check_equal, texts, with_plugin
from unspool_testing.drafters import DraftModel, GuessTrees, Recall
from unspool_testing.driver import GOOD, Circumstances, alone, check_conservation, drive, plugin, request
from unspool_testing.hosts import Bias, NarrowSearch, NoDoubles
from unspool_testing.runners import MisbehavingRunner
from unspool_testing.table import TableModel

VOCAB = 5
MODEL = TableModel(VOCAB)
NEIGHBOURS = [
    request(Pipeline(plugin(Sample)), (3, 1), seed=1, n=2),
    request(Pipeline(plugin(NarrowSearch)), (3, 2), n=2),
]


def beside_others(asked: PreparedRequest, circumstances: Circumstances = GOOD) -> Result:
    """Run a request between neighbours that must not notice."""
    first, result, last = drive(MODEL, [NEIGHBOURS[0], asked, NEIGHBOURS[1]], circumstances)
    for expected, got in zip(alone(MODEL, NEIGHBOURS), [first, last], strict=True):
        check_equal(expected, got)
    return result


@pytest.mark.parametrize("strategy", [Greedy, Sample, NarrowSearch])
@pytest.mark.parametrize("drafter", [None, GuessTrees])
@pytest.mark.parametrize("where", ["pre_forward", "logits_transform", "stop_check", "advance"])
def test_a_plugin_that_raises_fails_only_its_own_requests(
    where: str, drafter: type[Plugin] | None, strategy: type[Plugin]
) -> None:
    """Two requests of one group: one meets the fault at its third token, the other never."""
    faulty = plugin(Faulty, where=where)
    pipeline = Pipeline(plugin(strategy), [*([plugin(drafter)] if drafter else []), faulty])
    never = {"faulty": Faulty.Params(where=where, after=99)}
    bad = request(pipeline, (1, 2), seed=3, end_ids=())
    good = request(pipeline, (1, 2, 3), seed=4, end_ids=(), parameters=never)
    expected = alone(MODEL, [good])[0]
    assert expected.error is None
    for circumstances in (Circumstances(), Circumstances(token_budget=4, arrivals=[0, 2, 0, 1])):
        first, failed, fine, last = drive(MODEL, [NEIGHBOURS[0], bad, good, NEIGHBOURS[1]], circumstances)
        assert isinstance(failed.error, PluginError)
        assert (failed.error.plugin, failed.error.hook) == ("faulty", where)
        assert "ZeroDivisionError: as it was asked to" in str(failed.error)
        check_equal(expected, fine)
        for known, got in zip(alone(MODEL, NEIGHBOURS), [first, last], strict=True):
            check_equal(known, got)


@pytest.mark.parametrize("strategy", [Greedy, Sample, NarrowSearch])
@pytest.mark.parametrize("makes", ["nan", "inf"])
def test_a_row_that_becomes_nan_names_who_made_it(makes: str, strategy: type[Plugin]) -> None:
    pipeline = Pipeline(plugin(strategy), [plugin(Bias), plugin(Faulty, makes=makes), plugin(Bias, "after")])
    fine = {"faulty": Faulty.Params(makes=makes, after=99)}
    asked = [request(pipeline, (1, 2), end_ids=()), request(pipeline, (1, 3), end_ids=(), parameters=fine)]
    failed, good = drive(MODEL, asked)
    assert isinstance(failed.error, PluginError)
    assert (failed.error.plugin, failed.error.hook) == ("faulty", "logits_transform")
    check_equal(alone(MODEL, asked[1:])[0], good)


def test_what_goes_wrong_on_a_draft_that_nobody_chooses_is_no_fault() -> None:
    """The wrong drafts are long enough to meet the fault; the text ends before it does."""
    model = TableModel(VOCAB, table={(): [1, 0, 0, 0, 0]})
    for where, makes in [("logits_transform", "raise"), ("logits_transform", "nan"), ("advance", "raise")]:
        faulty = plugin(Faulty, where=where, makes=makes, after=1)
        pipeline = Pipeline(plugin(Greedy), [plugin(Recall, texts=((2, 2, 2, 2),)), faulty])
        assert texts(drive(model, [request(pipeline)])[0]) == [((0,), "eos")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("row", "rows out of range"),
        ("token", "tokens out of range"),
        ("twice", "twice"),
        ("shape", "Growth.token must be int64"),
        ("dtype", "Growth.token must be int64"),
        ("waits", "Growth.waits must be bool"),
        ("score", "Growth.score must be"),
        ("none", "it must return a Growth"),
        ("raise", "ZeroDivisionError"),
    ],
)
def test_nonsense_of_a_strategy_names_the_strategy(answer: str, reason: str) -> None:
    pipeline = Pipeline(plugin(BadStrategy, answer=answer))
    result = beside_others(request(pipeline, (1, 2), end_ids=()))
    assert isinstance(result.error, PluginError)
    assert (result.error.plugin, result.error.hook) == ("badstrategy", "select")
    assert reason in str(result.error)


def test_a_path_of_minus_infinity_is_the_dead_end_of_that_branch_alone() -> None:
    model = TableModel(VOCAB, table={(): [-9, 1, 1.5, -9, -9]})
    wall = plugin(Wall, token=2)
    search = request(Pipeline(plugin(NarrowSearch), [wall]), (1,), max_new_tokens=3, n=4)
    assert texts(drive(model, [search])[0])[0] == ((1, 1, 2), "length"), "the branch that did not meet the wall goes on"
    for drafter in (None, plugin(Recall, texts=((2, 2, 2), (2, 1)))):
        pipeline = Pipeline(plugin(Greedy), [drafter, wall] if drafter else [wall])
        error = drive(model, [request(pipeline, (1,))])[0].error
        assert isinstance(error, DeadEnd)
        assert error.path == (2,)


def test_samples_that_live_are_returned_beside_one_that_died() -> None:
    pipeline = Pipeline(plugin(Sample), [plugin(Wall, token=2)])
    asked = request(pipeline, (1,), n=12, seed=5, max_new_tokens=3, end_ids=())
    result = drive(MODEL, [asked])[0]
    assert 0 < len(result.hypotheses) < 12
    assert all(2 not in h.token_ids[:-1] for h in result.hypotheses)


def test_a_chosen_token_that_a_path_state_calls_impossible_is_a_constraint_error() -> None:
    for drafter in (None, plugin(Recall, texts=((3, 1, 1, 1), (3, 1, 3, 3)))):
        pipeline = Pipeline(plugin(Greedy), [plugin(NoDoubles, lies=True), *([drafter] if drafter else [])])
        error = beside_others(request(pipeline, (1, 2), end_ids=())).error
        assert isinstance(error, ConstraintError)
        assert error.plugin == "nodoubles"


def test_a_model_that_says_nan_is_named() -> None:
    runner = MisbehavingRunner(TableModel(VOCAB, table={(): [0, 0, 0, 1, 0], (4,): [0, 0, 3, 0, 0]}), nan_after={3})
    pipeline = Pipeline(plugin(Greedy), [plugin(Bias, bias=0.0)])
    spoilt, fine = drive(runner, [request(pipeline, (1,)), request(pipeline, (1, 4), max_new_tokens=1)])
    assert "model" in str(spoilt.error) and "NaN" in str(spoilt.error)
    assert texts(fine) == [((2,), "length")]


def test_a_pass_that_breaks_fails_those_who_were_in_it_and_the_next_one_goes_on() -> None:
    runner = MisbehavingRunner(TableModel(VOCAB), raises=lambda number: number == 1)
    pipeline = Pipeline(plugin(Greedy))
    first, later = drive(
        runner,
        [request(pipeline, (1,), end_ids=()), request(pipeline, (2,), end_ids=())],
        Circumstances(arrivals=[0, 3]),
    )
    assert isinstance(first.error, ModelError)
    assert len(later.token_ids) == 8


class Spendthrift(Plugin):
    """Ask a companion about many more drafts than `step.budget` allows."""

    row_local = True

    def companions(self) -> Mapping[str, Companion]:
        return {"draft": Companion()}

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        nodes = step.node
        for token in range(4):
            nodes = torch.cat([nodes, step.draft(nodes, [token] * len(nodes))])
        step.companion("draft", nodes)


def test_a_drafter_that_spends_more_slots_than_there_are_fails_alone_and_leaves_no_hole_in_the_cache() -> None:
    asked = request(Pipeline(plugin(Greedy), [plugin(Spendthrift)]), (1, 2), end_ids=())
    plain = request(Pipeline(plugin(Greedy)), (1, 2), end_ids=())
    for slots in (26, 30, 40, 60, 4000):
        result = beside_others(asked, Circumstances(slots=slots))
        if result.error is None:
            check_equal(alone(MODEL, [plain])[0], result)
        else:
            assert "spendthrift" in str(result.error) and "step.budget" in str(result.error)
    assert result.error is None


def test_a_strategy_whose_own_drafts_do_not_fit_makes_the_youngest_wait_and_fails_only_where_it_would_alone() -> None:
    greedy, impatient = Pipeline(plugin(Greedy)), Pipeline(plugin(Impatient, depth=5, tokens=(1, 2)))
    drafting = request(with_plugin(greedy, plugin(GuessTrees)), (1, 3), end_ids=())
    asked = [*(request(impatient, (1, 2), end_ids=(), seed=seed) for seed in range(2)), drafting]
    failed = []
    for slots in (20, 40, 60, 66, 70, 90, 140, 200):
        pool = Circumstances(slots=slots)
        expected = [drive(MODEL, [one], pool)[0] for one in asked]
        failed.append(sum(isinstance(result.error, AdmissionError) for result in expected))
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            for i, result in zip(order, drive(MODEL, [asked[i] for i in order], pool), strict=True):
                assert isinstance(result.error, type(expected[i].error))
                assert result.hypotheses == expected[i].hypotheses
    assert failed[0] == 2 and failed[-1] == 0


@pytest.mark.parametrize("kind", [Sample, NarrowSearch])
def test_what_is_opened_is_closed_once_however_a_request_ends(kind: type[Plugin]) -> None:
    Ledger.books.clear()
    ledger, strategy = plugin(Ledger), plugin(NarrowSearch, children=1) if kind is NarrowSearch else plugin(kind)
    ends = [
        request(Pipeline(strategy, [ledger]), (1,)),
        request(Pipeline(strategy, [ledger, plugin(Faulty)]), (1,), end_ids=()),
        request(Pipeline(strategy, [ledger]), (2,), end_ids=()),
        request(Pipeline(strategy, [ledger, plugin(Wall, token=1), plugin(Bias, token=1, bias=99)]), (1,)),
    ]
    results = drive(MODEL, ends, Circumstances(cancels={2: 3}, preempts=frozenset({2})))
    assert [type(r.error) for r in results] == [type(None), PluginError, type(None), DeadEnd]
    opened = [asked for word, asked in Ledger.books if word == "open"]
    closed = [asked for word, asked in Ledger.books if word == "close"]
    assert opened == ends and len(closed) == 4 and set(closed) == set(ends)


def test_a_ledger_that_does_not_open_or_close_fails_its_request() -> None:
    shut = beside_others(request(Pipeline(plugin(Greedy), [plugin(Ledger, closes=False)]), (1,)))
    assert isinstance(shut.error, PluginError) and (shut.error.plugin, shut.error.hook) == ("ledger", "close")
    closed = request(Pipeline(plugin(Greedy), [plugin(Ledger, opens=False)]), (1,))
    with pytest.raises(PluginError, match="'ledger' failed in open: OSError: the ledger does not open"):
        drive(MODEL, [closed])


def test_a_request_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    asked = request(Pipeline(plugin(Sample)), (1, 2, 3), max_new_tokens=10, n=2)
    error = beside_others(asked, Circumstances(slots=20)).error
    assert isinstance(error, AdmissionError)
    assert "21" in str(error) and "20" in str(error)


def test_a_search_that_outgrows_the_pool_fails_alone() -> None:
    wide = request(Pipeline(plugin(NarrowSearch, children=5, width=30)), (1,), max_new_tokens=6, end_ids=())
    error = beside_others(wide, Circumstances(slots=30)).error
    assert isinstance(error, AdmissionError)
    assert "30" in str(error) and "slots" in str(error)


def test_a_request_longer_than_the_window_is_refused() -> None:
    model = TableModel(VOCAB, window=8)
    fits, long = (request(Pipeline(plugin(Greedy)), (1, 2), max_new_tokens=n, end_ids=()) for n in (6, 7))
    first, second = drive(model, [fits, long])
    assert len(first.token_ids) == 6
    assert isinstance(second.error, AdmissionError)
    assert "8" in str(second.error)


def test_a_companion_of_another_vocabulary_is_refused() -> None:
    pipeline = with_plugin(Pipeline(plugin(Greedy)), plugin(DraftModel, model="other"))
    with pytest.raises(Exception, match="vocabulary has 3 tokens, the target's 5"):
        drive(MODEL, [request(pipeline)], models={"other": TableModel(3)})


def test_conservation_is_checked_for_real() -> None:
    loop = Loop(TableModel(VOCAB), 40)
    loop.submit(request(Pipeline(plugin(Greedy)), (1, 2)))
    loop.step()
    with pytest.raises(AssertionError, match="left"):
        check_conservation(loop)
