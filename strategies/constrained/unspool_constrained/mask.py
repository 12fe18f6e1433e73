"""Masks as a language gives them, with end tokens where a text may stop, ready for the logits (`unspool.masks`).

    out[t]  =  logits[t]  where t may follow, or t ends the text and it may stop;   -inf  elsewhere

Masks come as bits, one a token. Ids beyond the tokenizer's are padding and forbidden.
"""

from __future__ import annotations

import numpy as np

from unspool.masks import Octets
from unspool_constrained.engine import Bits


def octets_of(bits: Bits, size: int) -> Octets:
    """See masks as octets: `[rows, words]` int32 -> `[rows, octets]`, at least as many as `size` tokens take.

    The octets are the masks themselves, or where these are too short a longer copy. What has no bit is 0.
    """
    octets: Octets = bits.view(np.uint8)
    missing = -(-size // 8) - octets.shape[1]
    return np.pad(octets, ((0, 0), (0, missing))) if missing > 0 else octets


def allow_ends(masks: Octets, ends: list[tuple[int, int, bool]]) -> None:
    """Write into `masks`, in place, whether end tokens may follow: (row, token, whether the text may stop there)."""
    for row, token, may in ends:  # they are few, and whatever NumPy does for all of them takes longer
        octet, bit = int(masks[row, token >> 3]), 1 << (token & 7)
        masks[row, token >> 3] = octet | bit if may else octet & ~bit
