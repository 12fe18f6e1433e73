"""Sampling draws from exactly the distribution that it is given."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool import noise
from unspool.pipeline import Pipeline
from unspool_sample.sample import Sample, invert

INF = float("inf")


def sampler(kind: str) -> Sample:
    plugin = Sample(Sample.Params.model_validate({"noise": kind}))
    plugin.name = "sample"
    return plugin


def draw(kind: str, logits: Tensor, draws: int, seed: int = 1) -> Tensor:
    """Draw `draws` tokens from one row's logits, each in a stream of its own."""
    streams = torch.arange(draws)
    keys = noise.key(torch.tensor(seed), streams, torch.tensor(3), noise.purpose_key("sample"))
    step = SimpleNamespace(
        uniform=lambda purpose: noise.uniform(keys),
        sample=lambda purpose, logits: noise.draw(logits, keys),
    )
    return sampler(kind).select(cast(Any, step), logits.expand(draws, -1)).token


def masked_logits() -> st.SearchStrategy[list[float]]:
    value = st.one_of(st.floats(-6, 6), st.just(-INF))
    return st.lists(value, min_size=1, max_size=8).filter(lambda row: max(row) > -INF)


@settings(max_examples=50, deadline=None)
@given(masked_logits())
def test_uniform_noise_gives_each_token_an_interval_as_long_as_its_probability(row: list[float]) -> None:
    logits = torch.tensor(row, dtype=torch.float64)
    cells = 2000
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    token = invert(logits.expand(cells, -1), u)
    assert (token.diff() >= 0).all(), "the inverse of a distribution is monotone"
    share = torch.bincount(token, minlength=len(row)) / cells
    # Both ends of an interval are known to half a cell.
    assert (share - logits.softmax(-1)).abs().max() <= 1 / cells + 1e-12


@settings(max_examples=50, deadline=None)
@given(masked_logits(), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_a_token_of_probability_zero_is_never_drawn(row: list[float], u: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([row], dtype=dtype)
    for number in (u, 0.0, 1 - 2.0**-53, 1.0):
        token = invert(logits, torch.tensor([number], dtype=torch.float64))
        assert logits[0, token] > -INF
    assert logits[0, draw("gumbel", logits[0], 5)].min() > -INF


def test_a_probability_that_underflows_is_not_drawn_at_the_upper_end() -> None:
    logits = torch.tensor([[0.0, 0.0, -800.0, -INF]])
    assert invert(logits, torch.tensor([1.0], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("kind", ["gumbel", "uniform"])
def test_frequencies_match_the_distribution(kind: str) -> None:
    p = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.09, 0.01])
    draws = 40_000
    counted = torch.bincount(draw(kind, p.log(), draws), minlength=len(p)).double()
    assert counted[1] == 0
    real = p > 0
    chi2 = ((counted - draws * p)[real] ** 2 / (draws * p)[real]).sum().item()
    assert chi2 < 18.47  # the 0.999 quantile at 4 degrees of freedom; the seed is fixed


@pytest.mark.parametrize("kind", ["gumbel", "uniform"])
def test_a_vocabulary_of_one_token_has_one_choice(kind: str) -> None:
    assert draw(kind, torch.tensor([-3.0]), 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["gumbel", "uniform"])
def test_a_dead_row_is_answered_and_spoils_no_other(kind: str) -> None:
    step = SimpleNamespace(
        uniform=lambda purpose: torch.tensor([0.5, 0.5], dtype=torch.float64),
        sample=lambda purpose, logits: noise.draw(logits, torch.zeros(2, dtype=torch.int64)),
    )
    logits = torch.tensor([[-INF, -INF, -INF], [-INF, 0.0, -INF]])
    token = sampler(kind).select(cast(Any, step), logits).token
    assert 0 <= token[0] < 3 and token[1] == 1
    assert math.isinf(logits[0, 0])


def test_it_looks_ahead() -> None:
    assert Pipeline(sampler("gumbel")).looks_ahead
