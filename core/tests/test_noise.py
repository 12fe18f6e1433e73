"""Noise is a pure function of (seed, stream, position, purpose, token), uniform and independent in each of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool import noise
from unspool.huggingface import kernel

SEEDS = st.integers(0, 2**63 - 1)


def keys(seed: object = 0, stream: object = 0, position: object = 1, purpose: str = "sample") -> Tensor:
    parts = [torch.as_tensor(part, dtype=torch.int64).reshape(-1) for part in (seed, stream, position)]
    one, two, three = (part.expand(max(map(len, parts))) for part in parts)
    return noise.key(one, two, three, noise.purpose_key(purpose))


@given(seed=SEEDS, stream=st.integers(0, 2**40), position=st.integers(0, 2**40), purpose=st.text())
@settings(max_examples=200, deadline=None)
def test_a_draw_is_a_pure_function_strictly_between_0_and_1(
    seed: int, stream: int, position: int, purpose: str
) -> None:
    row = keys(seed, stream, position, purpose)
    u = noise.uniform(row)
    assert 0 < u.item() < 1
    assert u.dtype == torch.float64
    among_others = keys([1, seed, 2], [5, stream, 6], [8, position, 9], purpose)
    assert noise.uniform(among_others)[1] == u[0], "neighbours in a batch change nothing"
    for dtype in (torch.float32, torch.float64):
        g = noise.gumbel(row, 50, dtype)
        assert g.isfinite().all()
        assert torch.equal(noise.gumbel(among_others, 50, dtype)[1], g[0])
        assert torch.equal(noise.gumbel(row, 20, dtype)[0], g[0, :20]), "a token's noise knows no vocabulary"


def test_extreme_keys_stay_between_0_and_1() -> None:
    extreme = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1, 4095, -4096])
    u = noise.uniform(extreme)
    assert ((u > 0) & (u < 1)).all()


COUNT = 20_000
RANGE = torch.arange(COUNT)


@pytest.mark.parametrize(
    "row",
    [keys(RANGE), keys(7, RANGE), keys(7, 0, RANGE), keys(RANGE * 2**40), keys(RANGE, RANGE, RANGE)],
    ids=["seeds", "streams", "positions", "high bits", "all together"],
)
def test_draws_along_each_key_are_uniform_and_neighbours_are_independent(row: Tensor) -> None:
    assert len(set(row.tolist())) == COUNT
    u = noise.uniform(row)
    empirical = torch.arange(1, COUNT + 1) / COUNT
    assert (u.sort().values - empirical).abs().max() * math.sqrt(COUNT) < 2.2  # Kolmogorov and Smirnov at 1e-4
    for lag in (1, 2, 8):
        assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 4.5 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (keys(RANGE), keys(RANGE, purpose="other")),
        (keys(RANGE), keys(RANGE, stream=1)),
        (keys(RANGE), keys(RANGE, position=2)),
        (keys(RANGE, 1, 2), keys(RANGE, 2, 1)),
        (keys(5, RANGE), keys(5, RANGE, 2)),
    ],
    ids=["purposes", "streams", "positions", "swapped", "positions of streams"],
)
def test_purposes_streams_and_positions_draw_independently(one: Tensor, other: Tensor) -> None:
    assert not (one == other).any()
    for first, second in [
        (noise.uniform(one), noise.uniform(other)),
        (noise.gumbel(one, 1, torch.float64)[:, 0], noise.gumbel(other, 1, torch.float64)[:, 0]),
        (noise.uniform(one), noise.gumbel(one, 3, torch.float64)[:, 2]),
    ]:
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4.5 / math.sqrt(COUNT)


def test_gumbel_noise_has_its_mean_and_variance_and_tokens_are_independent() -> None:
    g = noise.gumbel(keys(RANGE), 8, torch.float64)
    assert g.mean().item() == pytest.approx(0.5772157, abs=0.02)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    off = torch.corrcoef(g.T) - torch.eye(8)
    assert off.abs().max() < 4.5 / math.sqrt(COUNT)


def test_the_winner_of_gumbel_noise_has_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for dtype in (torch.float32, torch.float64):
        wins = (logits.to(dtype) + noise.gumbel(keys(RANGE), 4, dtype)).argmax(-1).bincount(minlength=4) / COUNT
        torch.testing.assert_close(wins, logits.softmax(-1), atol=0.015, rtol=0)


def test_noise_of_both_dtypes_is_finite_and_alike_to_the_ends_of_both_tails() -> None:
    upper = torch.tensor([-(2**31) + step for step in (0, 1, 2, 50, 64, 65, 1000, 2**20, 2**31)], dtype=torch.int32)
    for mixed, tolerance in ((upper, 1e-6), (~upper, 0.02)):  # near 1 float32 has few numbers
        single, double = (noise._to_gumbel(noise._whole(mixed).to(dtype)) for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(single.double(), double, rtol=tolerance, atol=tolerance)
        assert single.isfinite().all() and (single.diff() <= 0).all() == (mixed is upper)
    assert 22 < noise._to_gumbel(noise._whole(upper).float()).max() < 22.2


def test_a_derived_seed_depends_on_run_and_request_and_stays_in_range() -> None:
    seeds = {noise.derive_seed(run, f"request {i}") for run in range(20) for i in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.data())
def test_a_draw_is_the_argmax_with_noise_however_few_tokens_are_possible(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 7, 500]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    logits = torch.randn(rows, vocab, dtype=dtype, generator=torch.Generator().manual_seed(vocab))
    for row in range(rows):
        for token in data.draw(st.sets(st.integers(0, vocab - 1), max_size=8)):
            logits[row, token] += 100
    logits.masked_fill_(logits < data.draw(st.sampled_from([-torch.inf, 50])), -torch.inf)
    drawn, some = keys(range(rows)), logits.amax(-1) > -torch.inf
    assert torch.equal(noise.draw(logits, drawn)[some], (logits + noise.gumbel(drawn, vocab, dtype)).argmax(-1)[some])


@pytest.mark.skipif(not kernel.available(), reason="there is no kernel here")
@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1000, 20_000])
def test_the_kernel_finds_whoever_may_win(vocab: int) -> None:
    random, drawn = torch.Generator().manual_seed(vocab), keys(range(60))
    added = noise.gumbel(drawn, vocab, torch.float32)
    for spread in (0.0, 0.1, 3.0, 30.0, 1e6):
        logits = torch.randn(60, vocab, generator=random) * spread
        best = (logits + added).argmax(-1)
        places = torch.ops.unspool.contenders(logits, drawn)
        assert torch.isin(torch.arange(60) * vocab + best, places).all() and len(places) < 60 * 1.5
        assert torch.equal(noise.draw(logits, drawn), best)
    if vocab > 1:  # two that are as good as equal
        logits = torch.randn(60, vocab, generator=random)
        logits[:, vocab // 2] = (logits + added).amax(-1) - added[:, vocab // 2] + torch.linspace(-4e-4, 4e-4, 60)
        assert len(torch.ops.unspool.contenders(logits, drawn)) >= 60 + 60 * (vocab > 100) // 2
        assert torch.equal(noise.draw(logits, drawn), (logits + added).argmax(-1))


@pytest.mark.skipif(not kernel.available(), reason="there is no kernel here")
def test_the_kernel_bears_rows_that_are_spoilt_and_rows_that_are_empty() -> None:
    logits = torch.randn(5, 100)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, 7] = logits[3, 9] = torch.inf
    assert noise.draw(logits, keys(range(5))).tolist()[3] == 7
    expected = (logits + noise.gumbel(keys(range(5)), 100, torch.float32)).argmax(-1)[[0, 4]]
    assert noise.draw(logits, keys(range(5)))[[0, 4]].tolist() == expected.tolist()
    for bad in (logits.double(), logits[0]):
        with pytest.raises(RuntimeError, match="of float32"):
            torch.ops.unspool.contenders(bad, keys(range(5)))
    with pytest.raises(RuntimeError, match="int64 key for each row"):
        torch.ops.unspool.contenders(logits, keys(range(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_on_a_cpu_has_the_bits_of_the_tensor_operations(dtype: torch.dtype) -> None:
    drawn = torch.cat([keys(range(50)), torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    low, high = noise._halves(drawn)
    token = torch.arange(300, dtype=torch.int32)
    mixed = noise._mix32(noise._mix32(token ^ low.unsqueeze(1)) ^ high.unsqueeze(1))
    assert torch.equal(noise.gumbel(drawn, 300, dtype), noise._to_gumbel(noise._whole(mixed).to(dtype)))
    assert torch.equal(noise.gumbel_at(drawn, token[: len(drawn)], dtype), noise.gumbel(drawn, 300, dtype).diagonal())
