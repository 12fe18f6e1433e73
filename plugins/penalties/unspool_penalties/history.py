"""What a row's path holds: which of its tokens count, and how each token's count is laid over the vocabulary.

Paths are padded on the right; padding never counts, whatever its ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unspool.step import Step


def counted_ids(step: Step, vocab: int, include_prompt: bool) -> Tensor:
    """List the ids on each row's path that count, and `vocab` in every other place.

    Ids that the output vocabulary lacks (an embedding may be larger) become `vocab` too.

    Returns:
        `[rows, longest]` int64, to be scattered into `vocab + 1` columns of which the last is thrown away.
    """
    ids, lengths = step.paths()
    position = torch.arange(ids.shape[-1], device=ids.device)
    counts = position < lengths.unsqueeze(-1)
    if not include_prompt:
        counts &= position >= (lengths - step.length).unsqueeze(-1)
    return ids.clamp(max=vocab).masked_fill(~counts, vocab)


def present(step: Step, logits: Tensor, include_prompt: bool) -> Tensor:
    """Tell which tokens stand on each row's path: `[rows, vocab]` bool."""
    rows, vocab = logits.shape
    seen = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)
    return seen.scatter_(-1, counted_ids(step, vocab, include_prompt), True)[:, :vocab]


def counts(step: Step, logits: Tensor, include_prompt: bool) -> Tensor:
    """Count how often each token stands on each row's path: `[rows, vocab]` in the dtype of `logits`."""
    rows, vocab = logits.shape
    ids = counted_ids(step, vocab, include_prompt)
    found = logits.new_zeros(rows, vocab + 1)
    return found.scatter_add_(-1, ids, found.new_ones(()).expand(ids.shape))[:, :vocab]
