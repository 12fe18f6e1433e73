"""Masks as a language gives them, with end tokens where a text may stop, ready for the logits (`unspool.masks`).

    out[t]  =  logits[t]  where t may follow, or t ends the text and it may stop;   -inf  elsewhere

Masks come as bits, one a token. Ids beyond the tokenizer's are padding and forbidden.
"""

from __future__ import annotations

import numpy as np

from unspool.masks import Octets
from unspool_constrained.engine import Bits


def octets_of(bits: Bits, size: int) -> Octets:
    """Copy masks: `[rows, words]` int32 -> `[rows, octets]`, as many as `size` tokens take. What has no bit is 0."""
    given = bits.view(np.uint8)
    octets = np.zeros((len(bits), -(-size // 8)), dtype=np.uint8)
    known = min(given.shape[1], octets.shape[1])
    octets[:, :known] = given[:, :known]
    return octets


def allow_ends(masks: Octets, ends: list[tuple[int, int, bool]]) -> None:
    """Write into `masks`, in place, whether end tokens may follow: (row, token, whether the text may stop there)."""
    for row, token, may in ends:  # they are few, and whatever NumPy does for all of them takes longer
        octet, bit = int(masks[row, token >> 3]), 1 << (token & 7)
        masks[row, token >> 3] = octet | bit if may else octet & ~bit
