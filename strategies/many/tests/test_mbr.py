"""Minimum Bayes risk returns what a slow double loop over `sample`'s texts returns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from unspool.errors import PluginError
from unspool.pipeline import Pipeline
from unspool.request import Hypothesis, Result
from unspool_many.mbr import MinimumBayesRisk
from unspool_many.utilities import chrf, exact, token_f1
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, plugin, request
from unspool_testing.table import TableModel

MODEL = TableModel(vocab_size=4, seed=2, spread=1.0)
UTILITIES = {"chrf": chrf, "token_f1": token_f1, "exact": exact}
CALLS: list[tuple[str, str]] = []


def counted(hypothesis: str, reference: str) -> float:
    CALLS.append((hypothesis, reference))
    return chrf(hypothesis, reference)


def recalled(hypothesis: str, reference: str) -> bool:
    return reference in hypothesis


def never(hypothesis: str, reference: str) -> float:
    return math.inf


def mbr(samples: int, utility: str, *, seed: int = 0, **fields: Any) -> Result:
    pipeline = Pipeline(plugin(MinimumBayesRisk, "mbr", samples=samples, utility=utility))
    [result] = alone(MODEL, [request(pipeline, seed=seed, max_new_tokens=6, **fields)])
    return result


def drawn(count: int, seed: int) -> Iterator[tuple[Hypothesis, str]]:
    """Give `sample`'s texts: without a tokenizer, their token ids."""
    [result] = alone(MODEL, [request(Pipeline(plugin(Sample)), seed=seed, n=count, max_new_tokens=6)])
    for hypothesis in result.hypotheses:
        yield hypothesis, " ".join(str(token) for token in hypothesis.token_ids if token != 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("utility", UTILITIES)
def test_it_is_what_a_double_loop_gives(utility: str, seed: int) -> None:
    each = list(drawn(9, seed))
    expected = []
    for hypothesis, text in each:
        gain = math.fsum(UTILITIES[utility](text, other) for _, other in each) / len(each)
        expected.append((-gain, hypothesis.stream, hypothesis.token_ids))
    got = mbr(9, utility, seed=seed, n=9)
    assert [(h.stream, h.token_ids) for h in got.hypotheses] == [(s, t) for _, s, t in sorted(expected)]
    assert [h.score for h in got.hypotheses] == pytest.approx([-gain for gain, _, _ in sorted(expected)])
    assert got.reports["mbr"]["expected_utilities"] == [h.score for h in got.hypotheses]


def test_candidates_are_the_first_argument_and_evidence_the_second() -> None:
    each = dict(drawn(8, 3))
    texts = list(each.values())
    best = max(texts, key=lambda text: sum(other in text for other in texts))
    worst = max(texts, key=lambda text: sum(text in other for other in texts))
    assert best != worst
    assert next(t for h, t in each.items() if h.token_ids == mbr(8, f"{__name__}:recalled", seed=3).token_ids) == best


def test_equal_texts_are_compared_once() -> None:
    CALLS.clear()
    mbr(30, f"{__name__}:counted", seed=1)
    different = {text for _, text in drawn(30, 1)}
    assert len(different) < 30
    assert sorted(CALLS) == sorted((one, other) for one in different for other in different)


def test_exact_utility_returns_the_commonest_text() -> None:
    texts = [text for _, text in drawn(40, 5)]
    commonest = max(texts, key=texts.count)
    result = mbr(40, "exact", seed=5)
    assert " ".join(str(token) for token in result.token_ids if token != 0) == commonest
    assert result.hypotheses[0].score == pytest.approx(texts.count(commonest) / 40)


def test_a_utility_that_is_no_number_names_itself() -> None:
    error = mbr(3, f"{__name__}:never").error
    assert isinstance(error, PluginError) and ":never" in str(error) and "gave inf" in str(error)
