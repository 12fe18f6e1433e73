"""Best of n returns the best of what `sample` draws, by whatever scores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from unspool.errors import ConfigError, PluginError
from unspool.pipeline import Pipeline, PluginSpec, build_plugin
from unspool.registry import Registry
from unspool.request import Hypothesis, PreparedRequest, Result
from unspool_many.best_of import BestOf
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, plugin, request
from unspool_testing.hosts import Tired
from unspool_testing.table import TableModel

MODEL = TableModel(vocab_size=5, seed=8)


def longest(request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[int]:
    assert [h.stream for h in hypotheses] == sorted(h.stream for h in hypotheses)
    return [len(h.token_ids) for h in hypotheses]


def wrong(request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[float]:
    return [math.nan] * len(hypotheses)


def too_few(request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[float]:
    return [0.0]


def best_of(samples: int, scorer: str, *, seed: int = 0, **fields: Any) -> Result:
    pipeline = Pipeline(plugin(BestOf, samples=samples, scorer=scorer), [plugin(Tired)])
    [result] = alone(MODEL, [request(pipeline, seed=seed, **fields)])
    return result


def drawn(count: int, seed: int) -> list[Hypothesis]:
    asked = request(Pipeline(plugin(Sample), [plugin(Tired)]), n=count, seed=seed, logprobs="pipeline")
    return list(alone(MODEL, [asked])[0].hypotheses)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scorer", ["logprob", "mean_logprob"])
def test_it_returns_the_best_of_what_sample_draws(scorer: str, seed: int) -> None:
    def score(hypothesis: Hypothesis) -> float:
        assert hypothesis.logprobs is not None
        total = math.fsum(hypothesis.logprobs)
        return total / len(hypothesis.logprobs) if scorer == "mean_logprob" else total

    expected = sorted(drawn(8, seed), key=lambda h: (-score(h), h.stream))[:3]
    got = best_of(8, scorer, seed=seed, n=3).hypotheses
    assert [(h.stream, h.token_ids) for h in got] == [(h.stream, h.token_ids) for h in expected]
    assert [h.score for h in got] == pytest.approx([score(h) for h in expected])


def test_the_scorers_disagree_somewhere() -> None:
    ours = [[best_of(8, scorer, seed=seed).token_ids for seed in range(12)] for scorer in ("logprob", "mean_logprob")]
    assert ours[0] != ours[1]


def test_a_scorer_of_ones_own_decides_and_ties_go_to_the_first_stream() -> None:
    result = best_of(9, f"{__name__}:longest", seed=3, n=9)
    lengths = [len(h.token_ids) for h in result.hypotheses]
    assert lengths == sorted(lengths, reverse=True) == [h.score for h in result.hypotheses]
    assert len(set(lengths)) < len(lengths)
    assert [(-len(h.token_ids), h.stream) for h in result.hypotheses] == sorted(
        (-len(h.token_ids), h.stream) for h in result.hypotheses
    )


def test_the_report_has_the_scores_of_all_samples_best_first() -> None:
    result = best_of(6, "logprob", seed=2, n=2)
    scores = result.reports["bestof"]["scores"]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert scores[:2] == [h.score for h in result.hypotheses]


@pytest.mark.parametrize(
    ("scorer", "message"), [("wrong", "gave nan, and a finite number"), ("too_few", "1 scores for 4 texts")]
)
def test_a_scorer_that_fails_names_itself(scorer: str, message: str) -> None:
    error = best_of(4, f"{__name__}:{scorer}").error
    assert isinstance(error, PluginError)
    assert "bestof" in str(error) and f":{scorer}" in str(error) and message in str(error)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("log_prob", "no 'log_prob' in unspool.scorers: installed: .*logprob.*mean_logprob"),
        ("no_such_module:score", "cannot import no_such_module:score: ModuleNotFoundError"),
        ("math:no_such", "cannot import math:no_such: AttributeError"),
        ("math:pi", "math:pi is a float, and a function is wanted"),
    ],
)
def test_a_scorer_that_is_not_there_is_refused_with_the_config(scorer: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"best_of\.scorer: .*{message}"):
        build_plugin(PluginSpec("best_of", {"scorer": scorer}), Registry.installed(), "strategy")
