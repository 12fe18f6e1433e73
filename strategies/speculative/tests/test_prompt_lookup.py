"""Prompt lookup finds what a plain search finds, and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from unspool.pipeline import Pipeline
from unspool_speculative.prompt_lookup import PromptLookup, follow, longest_match
from unspool_testing.compare import check_speculation
from unspool_testing.driver import plugin, request
from unspool_testing.hosts import Likeliest
from unspool_testing.table import TableModel

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=24)


def slow_match(path: list[int], most: int) -> tuple[int, int]:
    for count in range(min(most, len(path) - 1), 0, -1):
        for end in range(len(path) - 1, count - 1, -1):
            if path[end - count : end] == path[len(path) - count :]:
                return count, end
    return 0, 0


@settings(max_examples=300, deadline=None)
@given(PATHS, st.integers(1, 9))
def test_the_longest_ending_is_found_and_of_equal_ones_the_latest(path: list[int], most: int) -> None:
    assert longest_match(np.array(path), most) == slow_match(path, most)


@given(PATHS, st.integers(1, 9))
def test_what_followed_goes_on_with_itself_at_the_end_of_the_path(path: list[int], count: int) -> None:
    start = len(path) // 2
    said = path.copy()
    for i in range(count):
        said.append(said[start + i])
    assert follow(np.array(path), start, count) == said[len(path) :] if start < len(path) else True


def test_a_period_is_drafted_beyond_what_was_said() -> None:
    table: dict[tuple[int, ...], list[float]] = {
        (0,): [-9.0, 9.0, -9.0],
        (1,): [-9.0, -9.0, 9.0],
        (2,): [9.0, -9.0, -9.0],
    }
    plain = Pipeline(plugin(Likeliest))
    drafting = Pipeline(plain.strategy, [plugin(PromptLookup, length=9, adapt=False)])
    asked = request(plain, (0, 1, 2, 0, 1), max_new_tokens=21, end_ids=())
    result = check_speculation(TableModel(3, table=table), asked, plain, drafting)
    assert (result.stats.forward_passes, result.stats.accepted) == (3, 18)
    [drafted] = result.stats.drafters.values()
    assert drafted.run[0] == drafted.accepted[0] == 2 and len(drafted.run) == 9


def test_below_the_shortest_match_nothing_is_drafted() -> None:
    plain = Pipeline(plugin(Likeliest))
    drafting = Pipeline(plain.strategy, [plugin(PromptLookup, min_ngram=9, adapt=False)])
    asked = request(plain, (0, 1, 2, 1), max_new_tokens=4, end_ids=())
    assert check_speculation(TableModel(3, seed=1), asked, plain, drafting).stats.drafted == 0


def test_a_shortest_match_above_the_longest_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_ngram 5 is above max_ngram 3"):
        PromptLookup.Params(min_ngram=5, max_ngram=3)
