"""Token ids that a config named, checked against the vocabulary when it is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unspool.errors import InputError


def index(token_ids: Sequence[int], logits: Tensor, plugin: str) -> Tensor:
    """Put token ids `[n]` int64 on the device of `logits` `[rows, vocab]`; raise `InputError` if one is no token."""
    vocab = logits.shape[-1]
    if (largest := max(token_ids, default=0)) >= vocab:
        raise InputError(plugin, largest, f"token ids below {vocab}, the size of the model's vocabulary")
    return torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
