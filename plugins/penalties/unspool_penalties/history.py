"""What a row's path holds: which of its tokens count, and how each token's count is laid over the vocabulary.

Paths are padded on the right; padding never counts, whatever its ids.
"""

from __future__ import annotations

from collections.abc import Callable
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


def change_present(step: Step, logits: Tensor, include_prompt: bool, change: Callable[[Tensor], Tensor]) -> None:
    """Change the logits of the tokens that stand on each row's path, in place, and look at no others.

    Args:
        step: whose rows they are.
        logits: `[rows, vocab]`.
        include_prompt: tokens of the prompt count.
        change: maps logits `[rows, longest]` to what they become, each by itself.
    """
    vocab = logits.shape[-1]
    ids = counted_ids(step, vocab, include_prompt)
    first = ids.amin(dim=-1, keepdim=True)  # where nothing counts, one that counts once more; so it is changed but once
    places = torch.minimum(torch.where(ids < vocab, ids, first), first.new_tensor(vocab - 1))
    values = logits.gather(-1, places)
    logits.scatter_(-1, places, torch.where(first < vocab, change(values), values))


def counts(step: Step, logits: Tensor, include_prompt: bool) -> Tensor:
    """Count how often each token stands on each row's path: `[rows, vocab]` in the dtype of `logits`."""
    rows, vocab = logits.shape
    ids = counted_ids(step, vocab, include_prompt)
    found = logits.new_zeros(rows, vocab + 1)
    return found.scatter_add_(-1, ids, found.new_ones(()).expand(ids.shape))[:, :vocab]
