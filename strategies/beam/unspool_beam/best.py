"""The best of many values, in an order that nothing else decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unspool.step import Step


def best(values: Tensor, count: int) -> Tensor:
    """Find the largest values of each row, of equal ones those that stand first, in an order that nothing else decides.

    `topk` alone breaks ties as it likes, and otherwise where more rows are in the batch.

    Args:
        values: `[n, m]`.
        count: how many, at most `m`.

    Returns:
        `[n, count]` int64, best first.
    """
    top = values.topk(min(count + 1, values.shape[1]), dim=-1)
    if bool((top.values[:, :-1] > top.values[:, 1:]).all()):  # no two tie that matter, so there is one order
        return top.indices[:, :count]
    last = top.values[:, count - 1 : count]
    above, level = values > last, values == last
    room = count - above.sum(dim=-1, keepdim=True)
    index = (above | (level & (level.cumsum(dim=-1) <= room))).nonzero()[:, 1].view(len(values), count)
    order = values.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(1, order)


def by_request(step: Step, values: Tensor) -> Tensor:
    """Put the children of all rows of a request side by side.

    Args:
        step: whose rows they are.
        values: `[rows, vocab]`.

    Returns:
        `[requests, widest * vocab]`, -inf where there is no row. Child `c` grows from row
        `step.grid[request, c // vocab]` by token `c % vocab`.
    """
    there = step.grid >= 0
    return values[step.grid.clamp(min=0)].masked_fill(~there.unsqueeze(-1), -torch.inf).flatten(1)
