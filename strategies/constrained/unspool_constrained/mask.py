"""A mask applied: what a language forbids at the place of each row becomes -inf.

    out[t]  =  logits[t]  where t may follow, or t ends the text and it may stop;   -inf  elsewhere

Masks come as bits, one a token, and are unpacked where the logits are, so nothing loops over the vocabulary and little
is copied. Ids beyond the tokenizer's are padding and forbidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unspool_constrained.engine import Bits


def unpacked(bits: Bits, size: int, device: torch.device) -> Tensor:
    """Unpack masks: `[rows, words]` int32 -> `[rows, size]` bool. What has no bit is False."""
    octets = bits.view(np.uint8)
    if device.type == "cpu":
        allowed = torch.from_numpy(
            np.unpackbits(octets, axis=1, count=min(size, 8 * octets.shape[1]), bitorder="little")
        )
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        allowed = (torch.from_numpy(octets).to(device).unsqueeze(-1) >> shifts & 1).flatten(1)[:, :size]
    return torch.nn.functional.pad(allowed.to(torch.bool), (0, size - allowed.shape[1]))


def allow_ends(allowed: Tensor, ends: list[tuple[int, int, bool]]) -> None:
    """Write into `allowed`, in place, whether end tokens may follow: (row, token, whether the text may stop there)."""
    if ends:
        row, token, may = torch.tensor(ends, dtype=torch.int64, device=allowed.device).T
        allowed[row, token] = may.bool()
