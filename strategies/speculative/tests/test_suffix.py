"""Echoes and the suffix automaton know what a plain search knows, and what they have drafted changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.pipeline import Pipeline
from unspool_speculative.automaton import ROOT, Automaton
from unspool_speculative.echoes import MOST, Echoes
from unspool_speculative.hang import Guess, hang
from unspool_speculative.suffix import Memory, Suffix, likeliest
from unspool_testing.compare import check_equal, check_speculation
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.hosts import Drawn, Likeliest, NarrowSearch
from unspool_testing.table import TableModel

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=4)


def in_common(one: list[int], other: list[int]) -> int:
    """Count the last tokens in which two texts agree."""
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    return next((count for count, (a, b) in pairs if a != b), min(len(one), len(other)))


def occurrences(texts: list[list[int]], phrase: list[int]) -> int:
    return sum(text[i : i + len(phrase)] == phrase for text in texts for i in range(len(text) - len(phrase) + 1))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 3), max_size=6))
def test_the_automaton_finds_the_longest_ending_and_what_followed_it_how_often(
    texts: list[list[int]], path: list[int]
) -> None:
    automaton = Automaton()
    for text in texts:
        automaton.feed(text)
    longest = max(n for n in range(len(path) + 1) if n == 0 or occurrences(texts, path[len(path) - n :]))
    state, matched = automaton.find(path)
    assert matched == longest
    phrase = path[len(path) - longest :]
    expected = {token: n for token in range(3) if (n := occurrences(texts, [*phrase, token]))}
    assert {token: count for token, _, count in automaton.following(state)} == expected


@given(TEXTS)
def test_feeding_by_pieces_is_feeding_at_once(texts: list[list[int]]) -> None:
    whole, pieces = Automaton(), Automaton()
    for text in texts:
        whole.feed(text)
        last = ROOT
        for token in text:
            last = pieces.feed([token], last)
    for text in texts:
        for end in range(len(text)):
            ours, theirs = pieces.find(text[:end]), whole.find(text[:end])
            assert ours[1] == theirs[1]
            assert sorted((t, n) for t, _, n in pieces.following(ours[0])) == sorted(
                (t, n) for t, _, n in whole.following(theirs[0])
            )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_echoes_are_all_earlier_places_of_the_longest_ending_however_the_path_came(
    path: list[int], data: st.DataObject
) -> None:
    echoes = Echoes(64)
    for _ in range(data.draw(st.integers(0, 3))):  # it may have been on other paths, or on beginnings of this one
        known = data.draw(st.one_of(st.integers(1, len(path)).map(lambda n: path[:n]), st.just([1, 2])))
        echoes.hear(np.array(known))
    echoes.hear(np.array(path))
    lengths = {end: in_common(path[:end], path) for end in range(1, len(path))}
    longest = max(lengths.values(), default=0)
    assert echoes.matched == longest
    assert echoes.ends == tuple(end for end, length in lengths.items() if length == longest and longest)
    followed = Counter(path[end] for end in echoes.ends)
    assert {token: count for token, _, count in echoes.following(echoes.ends)} == followed


def test_what_followed_an_echo_is_walked_like_the_automaton() -> None:
    """One text alone: its ending was said twice before, and went on in two ways."""
    path = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 6, 9, 1, 2]
    echoes = Echoes(64)
    echoes.hear(np.array(path))
    assert (echoes.matched, echoes.ends) == (2, (2, 6, 10))
    guesses = likeliest(echoes, echoes.ends, echoes.matched, 5)
    assert [(g.parent, g.token) for g in guesses] == [(-1, 3), (-1, 6), (0, 4), (0, 5), (1, 9)]
    assert abs(guesses[0].sure - 2 / 3 * 2 / 3) < 1e-12


def test_a_word_without_end_has_few_echoes() -> None:
    echoes = Echoes(64)
    echoes.hear(np.full(5000, 7))
    assert (echoes.matched, len(echoes.ends)) == (64, MOST)
    echoes.hear(np.full(5001, 7))
    assert (echoes.matched, echoes.ends[-1]) == (65, 5000)


def test_the_likeliest_way_is_drafted_first_and_others_beside_it() -> None:
    automaton = Automaton()
    for text in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [1, 2, 6]):
        automaton.feed(text)
    state, matched = automaton.find([1, 2])
    guesses = likeliest(automaton, state, matched, 4)
    assert [(g.parent, g.token) for g in guesses] == [(-1, 3), (0, 4), (-1, 6), (0, 5)]
    assert abs(guesses[0].sure - 3 / 4 * 2 / 3) < 1e-12


def test_memory_forgets_the_oldest_half_and_stays_within_its_bound() -> None:
    memory = Memory(20)
    for number in range(30):
        memory.learn((100 + number, 1, 2, 3))
        assert memory.automaton.tokens <= 20
    assert memory.automaton.find([129, 1])[1] == 2 and memory.automaton.find([100])[1] == 0
    memory.learn(tuple(range(50)))
    assert memory.automaton.tokens == 20


def drafting(**params: Any) -> tuple[Pipeline, Pipeline]:
    plain = Pipeline(plugin(Likeliest))
    return plain, Pipeline(plain.strategy, [plugin(Suffix, adapt=False, **params)])


def test_what_an_engine_has_finished_is_drafted_in_the_next_request() -> None:
    model = TableModel(5, seed=3)
    plain, with_suffix = drafting()
    asked = request(plain, (1, 2, 3), max_new_tokens=12, end_ids=())
    [expected] = alone(model, [asked])
    twice = [request(with_suffix, (1, 2, 3), max_new_tokens=12, end_ids=())] * 2
    results = drive(model, twice, Circumstances(max_running=1))
    for result in results:
        check_equal(expected, result)
    assert results[1].stats.forward_passes == 1 < results[0].stats.forward_passes


def test_without_a_memory_nothing_is_learnt() -> None:
    model = TableModel(5, seed=3)
    _, with_suffix = drafting(remember=0, min_match=3)
    twice = [request(with_suffix, (1, 2, 3), max_new_tokens=6, end_ids=())] * 2
    first, second = drive(model, twice, Circumstances(max_running=1))
    assert first.stats.forward_passes == second.stats.forward_passes


def test_branches_that_part_are_read_each_in_its_turn() -> None:
    plain = Pipeline(plugin(Drawn))
    with_suffix = Pipeline(plain.strategy, [plugin(Suffix, adapt=False, min_match=1)])
    for seed in range(4):
        asked = request(plain, (1, 2), max_new_tokens=12, end_ids=(), n=3, seed=seed)
        assert check_speculation(TableModel(3, seed=seed), asked, plain, with_suffix).stats.drafted > 0


def test_rows_of_one_request_and_stream_are_guessed_at_each_by_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def compare(step: Any, guesses: list[list[Guess]], **settings: Any) -> list[dict[int, int]]:
        nonlocal seen
        paths, lengths = step.paths()
        for path, length, its in zip(paths.numpy(), lengths.tolist(), guesses, strict=True):
            echoes = Echoes(64)
            echoes.hear(path[:length])
            assert its == (likeliest(echoes, echoes.ends, echoes.matched, 4) if echoes.matched >= 2 else [])
        seen += sum(map(bool, guesses)) > 1 == len(set(step.stream.tolist()))
        return hang(step, guesses, **settings)

    monkeypatch.setattr("unspool_speculative.suffix.hang", compare)
    beams = Pipeline(plugin(NarrowSearch), [plugin(Suffix, adapt=False, remember=0, length=4)])
    [result] = drive(TableModel(3, seed=1), [request(beams, (1, 2), max_new_tokens=14, end_ids=())])
    assert result.error is None and seen
