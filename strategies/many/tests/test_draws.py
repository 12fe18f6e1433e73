"""What all strategies that draw many texts share: their samples are those of `sample`, and nobody disturbs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unspool.errors import InputError
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Result
from unspool_many.best_of import BestOf
from unspool_many.draws import Draws
from unspool_many.mbr import MinimumBayesRisk
from unspool_many.particles import Particles
from unspool_many.self_consistency import SelfConsistency
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_testing.compare import check_batch, check_speculation
from unspool_testing.drafters import GuessChains, GuessTrees
from unspool_testing.driver import Circumstances, alone, plugin, request
from unspool_testing.hosts import Bias, NoDoubles, Tired
from unspool_testing.table import TableModel

MODEL = TableModel(vocab_size=5, seed=3)
DRAWING = (BestOf, SelfConsistency, MinimumBayesRisk)
each_drawing = pytest.mark.parametrize("kind", DRAWING)
each = pytest.mark.parametrize("kind", [*DRAWING, Particles])


def of(kind: type[Plugin], count: int, *plugins: Plugin, **params: Any) -> Pipeline:
    params["samples" if issubclass(kind, Draws) else "particles"] = count
    return Pipeline(plugin(kind, **params), list(plugins))


def texts(result: Result) -> set[tuple[int, tuple[int, ...], str]]:
    assert result.error is None
    return {(h.stream, h.token_ids, h.finish_reason) for h in result.hypotheses}


def samples(count: int, seed: int, *plugins: Plugin, **fields: Any) -> Result:
    [result] = alone(MODEL, [request(Pipeline(plugin(Sample), list(plugins)), n=count, seed=seed, **fields)])
    return result


@each
@pytest.mark.parametrize("seed", range(4))
def test_one_is_what_sample_gives(kind: type[Plugin], seed: int) -> None:
    [result] = alone(MODEL, [request(of(kind, 1, plugin(Temperature, temperature=1.4)), seed=seed)])
    expected = samples(1, seed, plugin(Temperature, temperature=1.4))
    assert texts(result) == texts(expected)


@each
@pytest.mark.parametrize("seed", range(4))
def test_many_are_those_that_sample_gives(kind: type[Plugin], seed: int) -> None:
    # Particles of equal weight are never drawn anew.
    [result] = alone(MODEL, [request(of(kind, 7), n=7, seed=seed)])
    assert texts(result) == texts(samples(7, seed))


@each
def test_it_costs_the_longest_text_and_what_begins_alike_once(kind: type[Plugin]) -> None:
    [result] = alone(MODEL, [request(of(kind, 6), n=6, seed=1)])
    drawn = [h.token_ids for h in result.hypotheses]
    assert result.stats.forward_passes == max(map(len, drawn))
    beginnings = {text[:length] for text in drawn for length in range(1, len(text))}
    assert result.stats.rows == result.stats.prompt_tokens + len(beginnings)


@each
def test_more_texts_than_are_drawn_are_refused(kind: type[Plugin]) -> None:
    with pytest.raises(InputError, match=r"n = 4: at most .* 3"):
        alone(MODEL, [request(of(kind, 3), n=4)])


@each
@pytest.mark.parametrize("drafter", [GuessChains, GuessTrees])
def test_drafts_change_nothing(kind: type[Plugin], drafter: type[Plugin]) -> None:
    for seed in range(3):
        plain = of(kind, 4, plugin(Tired), plugin(Bias, token=2, bias=1.0))
        drafting = Pipeline(plain.strategy, [*plain.plugins[:-1], plugin(drafter)])
        check_speculation(MODEL, request(plain, n=4, seed=seed, logprobs="pipeline"), plain, drafting)


def test_a_mixed_batch_with_little_room_gives_what_each_gives_alone() -> None:
    makers: list[Callable[[], Pipeline]] = [
        lambda: of(BestOf, 4),
        lambda: of(SelfConsistency, 3, weighted=True),
        lambda: of(MinimumBayesRisk, 3, plugin(Tired), utility="token_f1"),
        lambda: of(Particles, 4, plugin(NoDoubles), resample_below=1.0),
        lambda: of(Particles, 4, plugin(NoDoubles), resample_below=1.0),
        lambda: of(Particles, 3, plugin(Bias, token=1, bias=2.0), potential="distinct", resampling="multinomial"),
        lambda: Pipeline(plugin(Sample)),
    ]
    asked = [request(make(), (number % 5, 2), seed=number, n=2) for number, make in enumerate(makers)]
    tight = Circumstances(slots=60, token_budget=9, arrivals=(0, 3, 1, 0, 2), preempts=frozenset({2, 4, 5, 9}))
    results = check_batch(MODEL, asked, tight)
    assert all(result.error is None for result in results)
    assert sum(result.stats.preemptions for result in results) >= 3
    [one, other] = (alone(MODEL, [asked[number]])[0].reports["particles"] for number in (3, 4))
    assert [results[number].reports["particles"] for number in (3, 4)] == [one, other]
    assert one["resamplings"] > 0
