"""Stochastic beams are samples without replacement: their order, their weights, and each text only once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache

import pytest
import torch

from unspool.errors import InputError
from unspool.pipeline import Pipeline
from unspool.request import Result
from unspool_beam import stochastic_claims
from unspool_beam.stochastic import StochasticBeamSearch, below, log_inclusion
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.table import TableModel

Text = tuple[int, ...]
END, NEW, RUNS = 0, 3, 6000
MODEL = TableModel(3, seed=5, memory=1)


@cache
def probabilities() -> dict[Text, float]:
    """Give the probability of every text of the model."""
    found: dict[Text, float] = {}
    for length in range(1, NEW + 1):
        for text in itertools.product(range(3), repeat=length):
            if END in text[:-1] or (length < NEW and text[-1] != END):
                continue
            logprobs = [MODEL.logits_after((1, *text[:at])).log_softmax(0)[token] for at, token in enumerate(text)]
            found[text] = math.exp(sum(map(float, logprobs)))
    assert math.fsum(found.values()) == pytest.approx(1)
    return found


@cache
def runs(width: int, count: int = RUNS) -> list[Result]:
    pipeline = Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=width))
    asked = [request(pipeline, (1,), max_new_tokens=NEW, end_ids=(END,), seed=seed, n=width) for seed in range(count)]
    return drive(MODEL, asked, Circumstances(slots=1 << 14, token_budget=1 << 14, max_running=1024))


def search(width: int, seed: int) -> Result:
    pipeline = Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=width))
    asked = request(pipeline, (1,), max_new_tokens=NEW, end_ids=(END,), seed=seed, n=width)
    return alone(MODEL, [asked])[0]


def test_ordered_subsets_are_as_likely_as_draws_without_replacement() -> None:
    p = probabilities()
    seen = Counter(tuple(h.token_ids for h in result.hypotheses) for result in runs(2))
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(p, 2)}
    assert set(seen) <= set(expected)
    often = {pair: RUNS * q for pair, q in expected.items() if RUNS * q >= 5}
    rare = RUNS - sum(often.values())
    chi = sum((seen[pair] - mean) ** 2 / mean for pair, mean in often.items())
    chi += (RUNS - sum(seen[pair] for pair in often) - rare) ** 2 / rare
    freedom = len(often)
    assert chi < freedom + 5 * math.sqrt(2 * freedom), "five standard deviations, with fixed seeds"


def test_the_first_text_is_a_plain_sample() -> None:
    seen = Counter(result.token_ids for result in runs(2))
    for text, p in probabilities().items():
        assert abs(seen[text] - RUNS * p) < 5 * math.sqrt(RUNS * p * (1 - p)) + 1


def test_the_weights_estimate_expectations_without_bias() -> None:
    p = probabilities()
    for value in (lambda _: 1.0, len, lambda text: float(text[0] == 1)):
        exact = sum(q * value(text) for text, q in p.items())
        estimates = torch.tensor(
            [
                sum(
                    weight * value(h.token_ids)
                    for weight, h in zip(result.reports["stochastic_beam"]["weights"], result.hypotheses, strict=True)
                )
                for result in runs(3)
            ],
            dtype=torch.float64,
        )
        error = float(estimates.std()) / math.sqrt(RUNS)
        assert abs(float(estimates.mean()) - exact) < 5 * error


def test_texts_are_different_and_come_in_the_order_of_their_perturbed_values() -> None:
    p = probabilities()
    for result in runs(3)[:500]:
        texts = [h.token_ids for h in result.hypotheses]
        scores = [h.score for h in result.hypotheses if h.score is not None]
        assert len(set(texts)) == len(scores) == 3 and scores == sorted(scores, reverse=True)
        report = result.reports["stochastic_beam"]
        assert report["logprobs"] == pytest.approx([math.log(p[text]) for text in texts])
        assert report["threshold"] < min(scores)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_a_narrow_search_finds_what_begins_the_order_of_all_texts(width: int) -> None:
    """Sampling without replacement by looking at every text is what the beam must equal, noise for noise."""
    most = len(probabilities())
    for seed in range(40):
        everything, narrow = search(most, seed), search(width, seed)
        assert [h.token_ids for h in narrow.hypotheses] == [h.token_ids for h in everything.hypotheses[:width]]
        values = [h.score for h in everything.hypotheses]
        assert [h.score for h in narrow.hypotheses] == pytest.approx(values[:width], abs=1e-12)
        assert narrow.reports["stochastic_beam"]["threshold"] == pytest.approx(values[width], abs=1e-12)


def test_every_text_has_gumbel_noise_of_its_own_around_its_log_probability() -> None:
    p, count = probabilities(), 2000
    noise: dict[Text, list[float]] = {text: [] for text in p}
    for result in runs(len(p), count):
        for hypothesis in result.hypotheses:
            noise[hypothesis.token_ids].append((hypothesis.score or 0.0) - math.log(p[hypothesis.token_ids]))
    values = torch.tensor([noise[text] for text in p], dtype=torch.float64)  # [texts, runs]
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (torch.exp(-torch.exp(-values.sort(dim=1).values)) - steps).abs().amax(dim=1)
    assert (distance < 2.5 / math.sqrt(count)).all(), "Kolmogorov and Smirnov: beyond it once in 130 000 tries"
    uniform = torch.exp(-torch.exp(-values))
    correlation = torch.corrcoef(uniform) - torch.eye(len(p), dtype=torch.float64)
    assert (correlation.abs() < 5 / math.sqrt(count)).all()


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_it_searches_as_the_formula_says_text_after_text(width: int) -> None:
    for seed in range(25):
        model = TableModel(2 + seed % 5, seed=seed)
        pipeline = Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=width))
        asked = request(pipeline, (1, 1), max_new_tokens=6, min_new_tokens=seed % 3, seed=seed, n=1 + seed % width)
        (result,) = alone(model, [asked])
        claimed = stochastic_claims.StochasticBeamSearch.texts(pipeline.strategy.params, model, asked)
        assert [h.token_ids for h in result.hypotheses] == [text for text, _ in claimed]
        assert [h.score for h in result.hypotheses] == pytest.approx([score for _, score in claimed], abs=1e-9)


def test_what_cannot_be_among_the_texts_any_more_is_not_run() -> None:
    model = TableModel(3, table={(): [20.0, 1.0, 0.0]})  # nearly every text ends at once
    pipeline = Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=2))
    for seed in range(20):
        (result,) = alone(model, [request(pipeline, (1,), max_new_tokens=8, seed=seed, n=2)])
        assert sorted(len(h.token_ids) for h in result.hypotheses) == [1, 2]
        assert result.stats.forward_passes == 2


def test_wide_enough_it_finds_every_text_and_each_counts_as_much_as_it_is_likely() -> None:
    p = probabilities()
    pipeline = Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=len(p) + 3))
    (result,) = alone(MODEL, [request(pipeline, (1,), max_new_tokens=NEW, end_ids=(END,), n=len(p) + 3)])
    assert {h.token_ids for h in result.hypotheses} == set(p)
    report = result.reports["stochastic_beam"]
    assert report["threshold"] is None
    assert report["weights"] == pytest.approx([p[h.token_ids] for h in result.hypotheses])


def test_children_are_moved_below_their_parent_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 7, generator=generator, dtype=torch.float64) * 3
    noise[:, 3] = -torch.inf
    parent = torch.randn(50, generator=generator, dtype=torch.float64)
    moved = below(noise, parent)
    assert torch.allclose(moved.amax(dim=1), parent)
    assert (moved[:, 3] == -torch.inf).all() and not moved.isnan().any()
    largest = noise.amax(dim=1, keepdim=True)
    plain = -(torch.exp(-parent.unsqueeze(1)) - torch.exp(-largest) + torch.exp(-noise)).log()
    assert torch.allclose(moved, plain, atol=1e-9)
    far = below(torch.tensor([[0.0, -800.0, -1e4]], dtype=torch.float64), torch.tensor([-40.0], dtype=torch.float64))
    assert far.isfinite().all()


def test_inclusion_is_a_probability_that_falls_with_the_threshold() -> None:
    values = [log_inclusion(-3.0, threshold) for threshold in (-math.inf, -50, -3, 0, 20, 60)]
    assert values == sorted(values, reverse=True) and values[0] == 0.0
    assert log_inclusion(-3.0, 60) == pytest.approx(-63)


def test_more_texts_than_beams_are_refused() -> None:
    with pytest.raises(InputError, match="at most the width of the beam, 2"):
        alone(MODEL, [request(Pipeline(plugin(StochasticBeamSearch, "stochastic_beam", width=2)), (1,), n=3)])
