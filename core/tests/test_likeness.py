"""How alike hidden states are: by plain torch, and by the kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unspool.huggingface import kernel
from unspool.likeness import nearest


def reference(candidates: Tensor, path: Tensor, lengths: list[int]) -> list[list[float]]:
    """Give it as it is defined, by Python's numbers."""
    found = []
    for some, states, length in zip(candidates.tolist(), path.tolist(), lengths, strict=True):
        found.append([max(_cosine(one, state) for state in states[:length]) for one in some])
    return found


def _cosine(one: list[float], other: list[float]) -> float:
    sizes = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / sizes if sizes else 0.0


def mask(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize(("width", "longest", "k"), [(1, 1, 1), (5, 3, 2), (16, 64, 4), (36, 65, 5), (64, 200, 9)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_each_candidate_has_the_cosine_that_the_definition_gives(
    stored: torch.dtype, width: int, longest: int, k: int, working: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(longest)
    lengths = [longest, 1, max(1, longest // 2)]
    candidates = torch.randn(3, k, width, generator=random, dtype=working) * 3
    path = torch.randn(3, longest, width, generator=random, dtype=working).to(stored)
    path[1, 1:] = torch.nan  # what is padded is never looked at
    path[2, 0] = 0
    found = nearest(candidates, path, mask(lengths, longest))
    assert found.dtype == working
    expected = reference(candidates.double(), path.double().nan_to_num(), lengths)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    short = nearest(candidates[2:], path[2:, : lengths[2]], mask(lengths[2:], lengths[2]))
    assert torch.equal(short, found[2:]), "a row is its own"


def test_equal_candidates_tie_wherever_they_stand(working: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    one, path = torch.randn(37, generator=random, dtype=working), torch.randn(1, 150, 37, dtype=working)
    for k in range(1, 11):
        found = nearest(one.expand(1, k, 37), path, torch.ones(1, 150, dtype=torch.bool))
        assert bool((found == found[0, 0]).all())


def test_nothing_is_like_zeros_and_what_is_spoilt_is_seen(working: torch.dtype) -> None:
    path = torch.randn(1, 70, 8, dtype=working)
    there = torch.ones(1, 70, dtype=torch.bool)
    zeros = torch.zeros(1, 2, 8, dtype=working)
    assert nearest(zeros, path, there).tolist() == [[0.0, 0.0]]
    assert nearest(zeros + 1, path, ~there).tolist() == [[-math.inf, -math.inf]]
    spoilt = torch.ones(1, 2, 8, dtype=working)
    spoilt[0, 1, 3] = torch.nan
    assert nearest(spoilt, path, there).isnan().tolist() == [[False, True]]
    path[0, 3, 2] = torch.nan  # and far from the end, with larger ones after it
    path[0, 69] = 1
    assert nearest(torch.ones(1, 2, 8, dtype=working), path, there).isnan().all()


def test_what_does_not_belong_together_is_refused() -> None:
    if not kernel.available():
        pytest.skip("there is no kernel here")
    op, there = torch.ops.unspool.nearest, torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"takes \[n, k, width\]"):
        op(torch.ones(2, 4, 8), torch.ones(2, 3, 7), there)
    with pytest.raises(RuntimeError, match=r"takes \[n, k, width\]"):
        op(torch.ones(2, 4, 8), torch.ones(2, 3, 8), there[:, :2])
    with pytest.raises(RuntimeError, match="float32 candidates and a mask of bool"):
        op(torch.ones(2, 4, 8), torch.ones(2, 3, 8), there.int())
    with pytest.raises(RuntimeError, match="float16, not Double"):
        op(torch.ones(2, 4, 8), torch.ones(2, 3, 8).double(), there)
