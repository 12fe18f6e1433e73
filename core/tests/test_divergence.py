"""How far distributions are apart: by plain torch, and by the kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unspool.distributions import divergence
from unspool.huggingface import kernel


def reference(p: Tensor, q: Tensor) -> Tensor:
    """Give it as it is defined: the mean of two Kullback-Leibler divergences from the mean."""
    p, q = p.double(), q.double()
    m = (p + q) / 2
    return sum((torch.xlogy(a, a) - torch.xlogy(a, m)).sum(dim=-1) / 2 for a in (p, q))  # type: ignore[return-value]


def test_a_divergence_is_symmetric_and_bounded() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.3, 0.2]], dtype=torch.float64)
    there, back = divergence(p.log() - 1, q.log() + 3), divergence(q.log(), p.log() - 2)
    assert there.tolist() == pytest.approx([0.0, math.log(2), float(reference(p[2], q[2]))])
    assert torch.allclose(there, back)


@pytest.fixture
def built() -> None:
    if not kernel.available():
        pytest.skip("there is no kernel here")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 511, 513, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_what_the_definition_gives(dtype: torch.dtype, vocab: int) -> None:
    random = torch.Generator().manual_seed(vocab)
    for spread in (0.1, 3.0, 30.0):
        logits = (torch.randn(3, vocab, generator=random) * spread - 100).to(dtype)
        others = (torch.randn(2, 3, vocab, generator=random) * spread).to(dtype)
        logits[0, : vocab // 2] = -torch.inf
        others[0, 1, 1:] = -torch.inf
        others[1, 2] += 1000
        found = divergence(logits, others)
        assert found.shape == (2, 3) and found.dtype == torch.float32
        expected = reference(logits.double().softmax(dim=-1), others.double().softmax(dim=-1))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-6)
        assert torch.equal(divergence(logits[2:], others[1, 2:]), found[1, 2:]), "a row is its own"


@pytest.mark.usefixtures("built")
def test_a_row_of_nan_is_seen_and_spoils_no_other() -> None:
    logits, others = torch.randn(3, 40), torch.randn(3, 40)
    others[1, 39] = torch.nan
    logits[2, 3] = torch.nan
    assert divergence(logits, others).isnan().tolist() == [False, True, True]
    assert divergence(logits.double(), others.double()).isnan().tolist() == [False, True, True]


@pytest.mark.usefixtures("built")
def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(RuntimeError, match="m a multiple of n"):
        torch.ops.unspool.divergence(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="m a multiple of n"):
        torch.ops.unspool.divergence(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="of one dtype"):
        torch.ops.unspool.divergence(torch.ones(2, 4).half(), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="float16, not Double"):
        torch.ops.unspool.divergence(torch.ones(2, 4).double(), torch.ones(2, 4).double())
