"""Contexts: the last tokens before a token, which decide what a watermark draws for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unspool.step import Step


def last_tokens(step: Step, width: int) -> tuple[Tensor, Tensor]:
    """Give the last tokens of each row's path, prompt included.

    Returns:
        `[rows, width]` token ids, and `[rows]` bool: whether the path has so many.
    """
    ids, lengths = step.paths()
    at = lengths.unsqueeze(-1) - width + torch.arange(width, device=ids.device)
    return ids.gather(-1, at.clamp(min=0)), lengths >= width


def had_before(step: Step, context: Tensor) -> Tensor:
    """Tell whether some new token on each row's path was chosen after that context already.

    Args:
        step: of the rows.
        context: `[rows, width]`, their last tokens.

    Returns:
        `[rows]` bool. What stands in the prompt was not chosen here, so it does not count.
    """
    width = context.shape[-1]
    ids, lengths = step.paths()
    starts = ids.shape[-1] - width + 1
    if starts < 1:
        return torch.zeros_like(lengths, dtype=torch.bool)
    same = torch.ones(len(ids), starts, dtype=torch.bool, device=ids.device)
    for offset in range(width):
        same &= ids[:, offset : offset + starts] == context[:, offset : offset + 1]
    chosen = torch.arange(width, width + starts, device=ids.device)  # where the token after each window stands
    prompt = (lengths - step.length).unsqueeze(-1)
    return (same & (chosen >= prompt) & (chosen < lengths.unsqueeze(-1))).any(dim=-1)
