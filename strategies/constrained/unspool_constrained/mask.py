"""Masks as a language gives them, with end tokens where a text may stop, ready for the logits (`unspool.masks`).

    out[t]  =  logits[t]  where t may follow, or t ends the text and it may stop;   -inf  elsewhere

Masks come as bits, one a token. Ids beyond the tokenizer's are padding and forbidden.
"""

from __future__ import annotations

import numpy as np

from unspool.masks import Octets


def long_enough(masks: Octets, size: int) -> Octets:
    """Give masks as they are, or where they are too short for `size` tokens a longer copy. What has no bit is 0."""
    missing = -(-size // 8) - masks.shape[1]
    return np.pad(masks, ((0, 0), (0, missing))) if missing > 0 else masks


def allow_ends(masks: Octets, ends: list[tuple[int, int, bool]]) -> None:
    """Write into `masks`, in place, whether end tokens may follow: (row, token, whether the text may stop there)."""
    for row, token, may in ends:  # they are few, and whatever NumPy does for all of them takes longer
        octet, bit = masks.item(row, token >> 3), 1 << (token & 7)
        if may != bool(octet & bit):
            masks[row, token >> 3] = octet ^ bit
