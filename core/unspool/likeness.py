"""How alike hidden states are.

On a CPU a model's runner brings a kernel that multiplies them where they lie (`huggingface/likeness.cpp`), where plain
torch copies a path into the working dtype and writes every product down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unspool.kernels import ALL, by_kernel

_LEAST_NORM = 1e-12
"""Of a vector that has a direction."""
_AT_ONCE = 1 << 22
"""Products of hidden states that are made before they are summed."""


def nearest(candidates: Tensor, path: Tensor, there: Tensor) -> Tensor:
    """Give the largest cosine between each candidate's hidden state and those of a path.

    Each cosine is a sum of products, not an entry of a matrix product: its bits depend on nothing else, so that
    candidates with equal hidden states tie, whatever else is in the batch.

    Args:
        candidates: `[rows, k, width]`.
        path: `[rows, longest, width]`, in any dtype.
        there: `[rows, longest]` bool, False where a path is padded.

    Returns:
        `[rows, k]` in the dtype of the candidates: from -1 to 1, 0 for a candidate of zeros, -inf beside an empty path,
        NaN where either has one.
    """
    operator = by_kernel("nearest", candidates, torch.float32)
    if operator is not None and path.dtype in ALL:
        found: Tensor = operator(candidates, path, there)
        return found
    rows = max(1, _AT_ONCE // (candidates.shape[1] * path[0].numel()))
    parts = zip(torch.split(candidates, rows), torch.split(path, rows), strict=True)
    cosines = torch.cat([_cosines(*some) for some in parts])
    return cosines.masked_fill(~there.unsqueeze(1), -torch.inf).amax(dim=-1)


def _cosines(candidates: Tensor, path: Tensor) -> Tensor:
    """Give the cosine of each candidate `[rows, k, width]` with each place of a path: `[rows, k, longest]`."""
    candidates, path = normalize(candidates, dim=-1), path.to(candidates)
    products = (candidates.unsqueeze(2) * path.unsqueeze(1)).sum(dim=-1)
    norms: Tensor = path.norm(dim=-1).clamp_(min=_LEAST_NORM)
    return products / norms.unsqueeze(1)
