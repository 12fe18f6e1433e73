"""Potentials: how much more, or less, a text is wanted than the model alone would write it.

A potential is a function `(request, token_ids, ended) -> float`, the logarithm of a weight, of the new tokens so far;
`ended` tells whether they are a whole text (not cut off by a limit). -inf forbids a text and all that begins like it.
It is named by an entry point in the group `unspool.potentials`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unspool.request import PreparedRequest


def distinct(request: PreparedRequest, token_ids: tuple[int, ...], ended: bool) -> float:  # noqa: ARG001
    """Prefer texts that do not go round in circles: the share of their tokens that differ from each other."""
    return math.log(len(set(token_ids)) / len(token_ids))
