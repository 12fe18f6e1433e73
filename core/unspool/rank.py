"""The best of each row of a wide table, in an order that nothing else decides: of equal values the first comes first.

`topk` alone breaks ties as it likes, and otherwise where more rows are in the batch. On a CPU these are several times
faster than the obvious `argmax` and `sort` over a vocabulary, and faster still by the kernel that a model's runner
brings (`huggingface/ranks.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unspool.kernels import by_kernel

_FIRST, _GROWTH = 128, 8
_SPARE = 16
"""How many values beyond those wanted are looked at first, so that ties at the edge show there."""


def widened(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give values in a dtype, copied unless they have it, and the largest of each row, NaN where there is one.

    `[n, m]` to `[n, m]` and `[n]`.
    """
    operator = by_kernel("widened", values, torch.bfloat16, torch.float16)
    if operator is not None and dtype == torch.float32:
        found: tuple[Tensor, Tensor] = operator(values)
        return found
    copy = values.to(dtype)
    return copy, copy.amax(dim=-1)


def argmax(values: Tensor) -> Tensor:
    """Find the first of the largest values of each row: `[n, m]` -> `[n]` int64. No value may be NaN."""
    operator = by_kernel("best", values, torch.float32)
    if operator is not None:
        first: Tensor = operator(values, 1).squeeze(1)
        return first
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(values.numpy().argmax(axis=-1))  # NumPy's compares a whole vector register at once
    return values.argmax(dim=-1)


def best(values: Tensor, count: int) -> Tensor:
    """Find the largest values of each row.

    Args:
        values: `[n, m]`; a NaN is as low as can be.
        count: how many, at most `m`.

    Returns:
        `[n, count]` int64, best first.
    """
    operator = by_kernel("best", values, torch.float32)
    if operator is not None and count:
        ranked: Tensor = operator(values, count)
        return ranked
    top = values.topk(min(count + _SPARE, values.shape[1]), dim=-1)
    if bool(top.values[:, 0].isnan().any()):  # for `topk` it is the largest
        return best(values.masked_fill(values.isnan(), -torch.inf), count)
    if bool((top.values[:, :-1] > top.values[:, 1:])[:, :count].all()):
        return top.indices[:, :count]  # no two tie that matter, so there is one order
    if top.values.shape == values.shape or bool((top.values[:, count - 1] > top.values[:, -1]).all()):
        index = top.indices.sort(dim=-1).values  # all that are as large as the last one wanted are here
    else:
        last = top.values[:, count - 1 : count]
        above, level = values > last, values == last
        room = count - above.sum(dim=-1, keepdim=True)
        index = (above | (level & (level.cumsum(dim=-1) <= room))).nonzero()[:, 1].view(len(values), count)
    order = values.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(1, order)[:, :count]


def best_until(values: Tensor, enough: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Rank the largest values of each row, as many as it takes.

    Args:
        values: `[n, m]`, none of them NaN.
        enough: is shown `[n, k]` values, best first, and their places, and tells `[n]` whether a row needs no more. It
            must not if what it is after may go on among values equal to the last one.

    Returns:
        `[n, k]` values, best first, and their places; k may be m.
    """
    width = values.shape[-1]
    count = _FIRST if values.device.type == "cpu" else width  # elsewhere a sort costs less than asking
    while count < width:
        found = best(values, count)
        ranked = values.gather(-1, found)
        if bool(enough(ranked, found).all()):
            return ranked, found
        count *= _GROWTH
    ranked, order = values.sort(dim=-1, descending=True, stable=True)
    return ranked, order
