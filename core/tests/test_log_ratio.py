"""What one distribution says beyond another: by plain torch, and by the kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unspool.distributions import log_ratio
from unspool.huggingface import kernel

INF = math.inf


def test_the_forbidden_stays_forbidden_and_nothing_becomes_nan(working: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -INF, 0.9, -9.0], [-INF] * 4, [0.0, -INF, -INF, -INF]], dtype=working)
    others = torch.tensor([[0.2, 0.0, 0.1, 0.7], [0.25] * 4, [0.5, 0.1, 0.0, 0.4]], dtype=working).log() + 5
    log_ratio(logits, others, torch.full((3, 1), 0.1, dtype=working))
    norm = math.log(math.exp(1.0) + math.exp(0.9) + math.exp(-9.0))
    assert logits[0].tolist() == pytest.approx([1.0 - norm - math.log(0.2), -INF, 0.9 - norm - math.log(0.1), -INF])
    assert logits[1].tolist() == [-INF] * 4
    assert logits[2].tolist() == pytest.approx([-math.log(0.5), -INF, -INF, -INF])


def test_a_spoilt_row_is_seen_and_spoils_no_other(working: torch.dtype) -> None:
    logits, others = torch.randn(4, 20, dtype=working), torch.randn(4, 20, dtype=working)
    logits[1, 19] = others[2, 3] = torch.nan
    log_ratio(logits, others, torch.full((4, 1), 0.1, dtype=working))
    assert logits.isnan().any(dim=-1).tolist() == [False, True, True, False]
    dead = torch.tensor([[-INF, torch.nan, -INF]], dtype=working)
    log_ratio(dead, torch.zeros(1, 3, dtype=working), torch.full((1, 1), 0.1, dtype=working))
    assert bool(dead.isnan().any())


@pytest.mark.parametrize("alpha", [1.0, 0.5, 1e-6])
def test_the_plausible_are_those_with_a_fraction_of_the_best_probability(alpha: float, working: torch.dtype) -> None:
    p = torch.tensor([[0.4, 0.2, 0.4 * alpha * 1.001, 0.4 * alpha * 0.999, 0.0]], dtype=working)
    p.clamp_(max=0.4)
    logits = p.log()
    if alpha == 0.5:
        logits[0, 1] += 1e-6  # else it is just as likely as has to be, to the last bit
    log_ratio(logits, torch.zeros(1, 5, dtype=working), torch.tensor([[alpha]], dtype=working))
    expected = [0, *([1] if alpha <= 0.5 else []), 2]
    assert (logits[0] > -INF).nonzero().flatten().tolist() == expected


def reference(logits: Tensor, others: Tensor, alpha: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """Give it as it is defined."""
    p, q = logits.double().log_softmax(dim=-1), others.double().log_softmax(dim=-1)
    plausible = p >= p.amax(dim=-1, keepdim=True) + alpha.double().log()
    return torch.where(plausible, gain * p - weight * q, -INF)


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 511, 513, 5000])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_is_by_its_own_numbers_what_the_definition_gives(
    other: torch.dtype, vocab: int, working: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(vocab)
    alpha, gain, weight = torch.rand(3, 3, 1, generator=random, dtype=working).clamp(min=0.01)
    for spread in (0.1, 3.0, 30.0):
        logits = torch.randn(3, vocab, generator=random, dtype=working) * spread
        others = (torch.randn(3, vocab, generator=random, dtype=working) * spread).to(other)
        logits[0, 1:] = others[1, 1:] = -INF
        others[2] += 1000
        for numbers in ((alpha,), (alpha, gain), (alpha, gain, weight)):
            found = logits.clone()
            log_ratio(found, others, *numbers)
            given = *numbers, *[torch.ones_like(alpha)] * (3 - len(numbers))
            torch.testing.assert_close(found.double(), reference(logits, others, *given), rtol=1e-5, atol=3e-5)
            alone = logits[2:].clone()
            log_ratio(alone, others[2:], *(each[2:] for each in numbers))
            assert torch.equal(alone, found[2:]), "a row is its own"


def test_what_does_not_belong_together_is_refused() -> None:
    if not kernel.available():
        pytest.skip("there is no kernel here")
    one, ratio = torch.ones(2, 1), torch.ops.unspool.log_ratio_
    with pytest.raises(RuntimeError, match="others as many"):
        ratio(torch.ones(2, 4), torch.ones(3, 4), one, one, one)
    with pytest.raises(RuntimeError, match="in one piece"):
        ratio(torch.ones(4, 2).T, torch.ones(2, 4), one, one, one)
    with pytest.raises(RuntimeError, match="a float32 number for each row"):
        ratio(torch.ones(2, 4), torch.ones(2, 4), one, one[:1], one)
    with pytest.raises(RuntimeError, match="float16, not Double"):
        ratio(torch.ones(2, 4), torch.ones(2, 4).double(), one, one, one)
