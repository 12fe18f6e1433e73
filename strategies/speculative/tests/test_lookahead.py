"""Lookahead finds what repeats, and what it has tried out, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.errors import PluginError
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_speculative.lookahead import FIRSTS, Lookahead, Pool, Stream, laid_out, move, tree
from unspool_testing.compare import check_batch, check_speculation, with_plugin
from unspool_testing.driver import Circumstances, alone, plugin, request
from unspool_testing.hosts import Drawn, Forks, Likeliest, LookAheadChoice, NarrowSearch, NoDoubles, Particles, Tired
from unspool_testing.table import Table, TableModel

VOCAB = 5
PERIOD: Table = {(0,): [-9.0, 9.0, -9.0], (1,): [-9.0, -9.0, 9.0], (2,): [9.0, -9.0, -9.0]}


def lookahead(**params: Any) -> Plugin:
    return plugin(Lookahead, **{"adapt": False, **params})


# ---- no token changes ------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([1, 2, None]),
    st.integers(0, 6),
    st.integers(2, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_no_text_changes(seed: int, memory: int | None, window: int, ngram: int, guesses: int, adapt: bool) -> None:
    model = TableModel(VOCAB, seed=seed, memory=memory)
    drafter = lookahead(window=window, ngram=ngram, guesses=guesses, adapt=adapt)
    for plain in (
        Pipeline(plugin(Likeliest)),
        Pipeline(plugin(Drawn), [plugin(Tired)]),
        Pipeline(plugin(Drawn), [plugin(NoDoubles, most=9)]),
        Pipeline(plugin(Forks)),
        Pipeline(plugin(NarrowSearch, children=3, width=2)),
        Pipeline(plugin(Particles)),
        Pipeline(plugin(LookAheadChoice)),
    ):
        many = plain.strategy.row_local and type(plain.strategy) is not Forks
        asked = request(plain, (1, 2, 1), max_new_tokens=9, seed=seed, n=3 if many else 1)
        check_speculation(model, asked, plain, with_plugin(plain, drafter))


def test_in_a_batch_each_request_comes_to_its_own() -> None:
    drafting = Pipeline(plugin(Drawn), [lookahead(window=4, ngram=3)])
    asked = [request(drafting, (1, i), max_new_tokens=9, seed=i, n=1 + i % 2) for i in range(4)]
    model = TableModel(VOCAB, seed=4, memory=1)
    for circumstances in (
        Circumstances(slots=90, token_budget=12, preempts=frozenset({2, 5})),
        Circumstances(slots=40, arrivals=(0, 2, 1, 3), preempts=frozenset({1, 3, 4})),
    ):
        check_batch(model, asked, circumstances)


def test_a_neighbour_that_fails_takes_nobody_along() -> None:
    class Raises(Plugin):
        row_local = True

        @hookimpl
        def logits_transform(self, step: Step, logits: Any) -> None:
            if any(request.seed == 1 for request in step.requests) and bool((step.length > 2).any()):
                raise ZeroDivisionError("as it was asked to")

    drafting = Pipeline(plugin(Drawn), [plugin(Raises), lookahead()])
    asked = [request(drafting, (1, 2), max_new_tokens=8, end_ids=(), seed=seed) for seed in range(3)]
    results = check_batch(TableModel(VOCAB, seed=4, memory=1), asked, Circumstances())
    assert [type(result.error) for result in results] == [type(None), PluginError, type(None)]


# ---- what it is good for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Likeliest, Drawn, NarrowSearch, Particles])
def test_a_text_that_repeats_itself_is_drafted_under_every_strategy(kind: type[Plugin]) -> None:
    params: dict[str, Any] = {"children": 1, "width": 1} if kind is NarrowSearch else {}
    plain = Pipeline(plugin(kind, **params))
    drafting = with_plugin(plain, lookahead(ngram=5))
    asked = request(plain, (0, 1, 2, 0, 1, 2, 0), max_new_tokens=30, end_ids=())
    result = check_speculation(TableModel(3, table=PERIOD), asked, plain, drafting)
    assert result.stats.accepted >= 20 and result.stats.forward_passes <= 8


@pytest.mark.parametrize("kind", [Likeliest, Drawn])
def test_phrases_that_were_never_said_are_found(kind: type[Plugin]) -> None:
    """What counts upwards never repeats itself; but from the numbers of the prompt on it was tried out."""
    table: Table = {(i,): [9.0 if j == i + 1 else -9.0 for j in range(64)] for i in range(64)}
    prompt, model = tuple(range(40, -1, -4)), TableModel(64, table=table)
    without, tried = (
        alone(
            model,
            [request(Pipeline(plugin(kind), [lookahead(window=window)]), prompt, max_new_tokens=40, end_ids=())],
        )[0].stats
        for window in (0, 8)
    )
    assert (without.accepted, without.forward_passes) == (0, 40)
    assert tried.accepted >= 15 and tried.forward_passes == 40 - tried.accepted


def test_a_sampled_text_is_iterated_with_its_own_noise() -> None:
    accepted = {0: 0, 8: 0}
    for window in accepted:
        drafting = Pipeline(plugin(Drawn), [lookahead(window=window, ngram=4)])
        asked = [request(drafting, (1, 2, 3), max_new_tokens=40, end_ids=(), seed=seed) for seed in range(6)]
        results = alone(TableModel(8, seed=3, memory=1, spread=4.0), asked)
        accepted[window] = sum(result.stats.accepted for result in results)
    assert accepted[8] > accepted[0] + 20


def test_ends_and_limits_end_the_guesses() -> None:
    drafting = Pipeline(plugin(Likeliest), [lookahead(window=12)])
    result = alone(TableModel(3, table=PERIOD), [request(drafting, (0, 1, 2, 0), max_new_tokens=3, end_ids=(0,))])[0]
    assert result.token_ids == (1, 2, 0) and result.stats.forward_passes <= 3


# ---- the window ------------------------------------------------------------------------------------------------------


def test_phrases_lose_their_first_token_and_grow_by_what_was_said() -> None:
    pool, stream = Pool(4, 4), Stream(read=2, start=2, window=[[1, 2, 3], [4, 5, 6], [7, 8, 9]], said={0: 10, 2: 30})
    move(stream, pool, [50, 51, 52], columns=3)
    assert [pool.after(first) for first in (1, 2, 3)] == [[((4, 7, 10), 1)], [], [((6, 9, 30), 1)]]
    assert stream.window[:2] == [[4, 5, 6], [7, 8, 9]]
    assert stream.window[2][::2] == [10, 30] and stream.window[2][1] in (50, 51, 52)
    assert (stream.start, stream.read, stream.said) == (3, 3, {})


def test_the_window_moves_as_far_as_the_text_has_come() -> None:
    stream = Stream(read=2, start=2, window=[[1, 2, 3], [4, 5, 6]], said={0: 7, 1: 8, 2: 9})
    move(stream, Pool(3, 4), [50, 50, 50, 50], columns=3)
    assert stream.window == [[5, 6, 50], [8, 9, 50]]
    move(stream, Pool(3, 4), [50] * 30, columns=3)
    assert stream.window == [[5, 6, 50], [8, 9, 50]]  # nothing was said since: it is only hung elsewhere


def test_what_is_missing_goes_on_as_the_pool_does() -> None:
    pool, stream = Pool(3, 4), Stream(read=2)
    pool.learn([5, 6, 7, 8])
    move(stream, pool, [5, 5], columns=2)
    assert stream.window == [[5, 5], [6, 6]]


def test_each_column_hangs_off_the_chain_of_those_before_it() -> None:
    guesses, ends = laid_out([[1, 2], [3, 4], [5, 6]], first=10)
    assert [(guess.parent, guess.token) for guess in guesses] == [(-1, 1), (10, 3), (11, 5), (10, 2), (13, 4), (14, 6)]
    assert ends == [12, 15]
    assert laid_out([[], []], first=0) == ([], [])


# ---- the pool --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(2, 4), st.integers(1, 3))
def test_the_pool_has_the_latest_phrases_of_each_first_token(tokens: list[int], ngram: int, most: int) -> None:
    pool = Pool(ngram, most)
    pool.learn(tokens)
    phrases = [tuple(tokens[end - ngram : end]) for end in range(ngram, len(tokens) + 1)]
    for first in range(4):
        latest = list(
            dict.fromkeys(rest for head, *rest_ in reversed(phrases) if head == first for rest in [tuple(rest_)])
        )
        assert [rest for rest, _ in pool.after(first)] == latest[:most]


def test_a_pool_does_not_grow_for_ever() -> None:
    pool = Pool(2, 1)
    pool.learn(range(3 * FIRSTS))
    assert len(pool._phrases) == FIRSTS
    assert pool.after(0) == [] and pool.after(3 * FIRSTS - 2) == [((3 * FIRSTS - 1,), 1)]


def test_reading_on_takes_up_each_phrase_once() -> None:
    pool, tokens, stream = Pool(3, 9), [1, 2, 1, 2, 1, 2, 3], Stream(read=0)
    for length in (2, 3, 6, 7):
        move(stream, pool, tokens[:length], columns=0)
    assert pool.after(1) == [((2, 3), 1), ((2, 1), 2)]
    assert pool.after(2) == [((1, 2), 2)]


def test_phrases_with_one_beginning_are_one_branch_and_what_came_often_is_surer() -> None:
    guesses = tree([((1, 2), 3), ((1, 3), 1), ((4, 2), 1)])
    assert [(guess.parent, guess.token) for guess in guesses] == [(-1, 1), (0, 2), (0, 3), (-1, 4), (3, 2)]
    sure = [guess.sure for guess in guesses]
    assert sure[0] > sure[3] and sure[1] > sure[2] and all(0 < each < 1 for each in sure)
    assert tree([]) == []
