"""Masks of bits applied: what they forbid becomes -inf.

On a CPU a model's runner brings a kernel that writes only where something is forbidden (`huggingface/masks.cpp`).
Without it each octet is looked up as eight numbers, -inf where a token is forbidden and NaN elsewhere, which `fmin`
overlooks: there is no branch a token, and a row stays in the cache. On other devices masks are unpacked where the
logits are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.kernels import by_kernel

Octets = NDArray[np.uint8]
"""Masks of rows, `[rows, octets]`: one bit a token, the lowest bit of an octet first."""

_EIGHT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_LIMITS = np.where(_EIGHT, np.float32(np.nan), np.float32(-np.inf))
"""What each octet lets its eight tokens be at most; NaN: anything."""


def forbid(logits: Tensor, masks: Octets) -> None:
    """Write -inf into logits, in place, where a mask has no bit.

    Args:
        logits: `[rows, vocab]`.
        masks: `[rows, octets]`, at least an octet for every eight tokens.
    """
    size = logits.shape[1]
    operator = by_kernel("forbid_", logits, torch.float32)
    if operator is not None and logits.is_contiguous():
        operator(logits, torch.from_numpy(masks))
        return
    if logits.device.type == "cpu":
        for row, mask in zip(logits.numpy(), masks, strict=True):
            np.fmin(row, _LIMITS.take(mask, axis=0).reshape(-1)[:size], out=row)
        return
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (torch.from_numpy(masks).to(logits.device).unsqueeze(-1) >> shifts & 1).flatten(1)[:, :size]
    logits.masked_fill_(allowed == 0, -torch.inf)
