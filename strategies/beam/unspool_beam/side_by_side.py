"""What all rows of a request have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unspool.step import Step


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
    if bool(there.all()) and torch.equal(step.grid.flatten(), torch.arange(len(values), device=step.grid.device)):
        return values.view(len(step.grid), -1)  # as it is when no beam has ended
    return values[step.grid.clamp(min=0)].masked_fill(~there.unsqueeze(-1), -torch.inf).flatten(1)
