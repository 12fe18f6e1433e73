"""A mask applied: what a language forbids at the place of each row becomes -inf.

    out[t]  =  logits[t]  where t may follow, or t ends the text and it may stop;   -inf  elsewhere

Masks come as bits, one a token. On a CPU each octet of them is looked up as eight numbers, -inf where a token is
forbidden and NaN elsewhere, which `fmin` overlooks: there is no branch a token, and a row stays in the cache. On other
devices masks are unpacked where the logits are. Ids beyond the tokenizer's are padding and forbidden.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool_constrained.engine import Bits

Octets = NDArray[np.uint8]
"""Masks of rows, `[rows, octets]`: one bit a token, the lowest bit of an octet first."""

_EIGHT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_LIMITS = np.where(_EIGHT, np.float32(np.nan), np.float32(-np.inf))
"""What each octet lets its eight tokens be at most; NaN: anything."""


def octets_of(bits: Bits, size: int) -> Octets:
    """Copy masks: `[rows, words]` int32 -> `[rows, octets]`, as many as `size` tokens take. What has no bit is 0."""
    given = bits.view(np.uint8)
    octets = np.zeros((len(bits), -(-size // 8)), dtype=np.uint8)
    known = min(given.shape[1], octets.shape[1])
    octets[:, :known] = given[:, :known]
    return octets


def allow_ends(masks: Octets, ends: list[tuple[int, int, bool]]) -> None:
    """Write into `masks`, in place, whether end tokens may follow: (row, token, whether the text may stop there)."""
    if ends:
        row, token, may = np.array(ends, dtype=np.int64).T
        where, bit = (row, token >> 3), (1 << (token & 7)).astype(np.uint8)
        np.bitwise_and.at(masks, where, ~bit)
        np.bitwise_or.at(masks, where, bit * may.astype(np.uint8))


def forbid(logits: Tensor, masks: Octets) -> None:
    """Write -inf into `logits` `[rows, vocab]`, in place, where a mask has no bit."""
    size = logits.shape[1]
    if logits.device.type == "cpu":
        for row, mask in zip(logits.numpy(), masks, strict=True):
            np.fmin(row, _LIMITS.take(mask, axis=0).reshape(-1)[:size], out=row)
        return
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (torch.from_numpy(masks).to(logits.device).unsqueeze(-1) >> shifts & 1).flatten(1)[:, :size]
    logits.masked_fill_(allowed == 0, -torch.inf)
