"""Token ids as parameters: validated when the config is read, checked against the vocabulary when it is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from unspool.errors import InputError

TokenId = Annotated[int, Field(ge=0)]
"""One token id."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1), BeforeValidator(_listed)]
"""At least one token id; a bare id stands for a list of one."""


def index(token_ids: Sequence[int], logits: Tensor, plugin: str) -> Tensor:
    """Put token ids `[n]` int64 on the device of `logits` `[rows, vocab]`; raise `InputError` if one is no token."""
    vocab = logits.shape[-1]
    if (largest := max(token_ids, default=0)) >= vocab:
        raise InputError(plugin, largest, f"token ids below {vocab}, the size of the model's vocabulary")
    return torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
