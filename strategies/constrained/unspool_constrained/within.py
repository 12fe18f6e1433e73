"""Keeping a budget: near its end, only tokens after which the text can still be completed.

Let r be how many tokens may still come, and w the way to the end from a row. While r >= |w| + 2 + SLACK nothing is
done. Then a token is allowed if it is the next one of w, or if after it w, or a beginning of it, leads to the end in
time. Of the tokens that the language allows, the likeliest are tried so; all others are forbidden there.

An end takes one token, so a way of |w| tokens needs r >= |w| + 1, and each token that is allowed keeps that true. What
can break it is one token, taken before, that obliges the text to more than SLACK tokens at once; and a language in
which no way is found. Costs a walk along w for each token that is tried, on the last stretch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unspool.masks import Octets, forbid
from unspool_constrained.place import Place

if TYPE_CHECKING:
    from unspool.step import Step

SLACK = 24
"""How many tokens before the last moment the stretch begins in which tokens are tried."""
LIKELIEST, LIKELIEST_AT_LAST = 32, 8
"""Tokens that are tried at each place of it; and where there is room for w and nothing else."""


def keep_within(step: Step, places: Sequence[Place], logits: Tensor, masks: Octets) -> None:
    """Forbid, in `masks` in place, tokens after which the text could not be completed in time."""
    size = logits.shape[1]
    lengths, numbers = step.length.tolist(), step.request.tolist()
    for row, (place, length, number) in enumerate(zip(places, lengths, numbers, strict=True)):
        way = place.way()
        room = step.requests[number].limits.max_new_tokens - length
        if way is None or not len(way) + 1 <= room < len(way) + 2 + SLACK:
            continue
        good = _in_time(place, way, room, logits[row : row + 1], masks[row : row + 1])
        kept = np.zeros(8 * masks.shape[1], dtype=bool)
        kept[[token for token in (*good, *place.ends) if token < size]] = True
        masks[row] &= np.packbits(kept, bitorder="little")


def _in_time(place: Place, way: tuple[int, ...], room: int, logits: Tensor, mask: Octets) -> list[int]:
    """List tokens after which the text can still be completed in time. One row: `[1, vocab]`, `[1, octets]`."""
    good = list(way[:1])
    assert place.finder is not None
    masked = logits.clone()
    forbid(masked, mask)
    tried = LIKELIEST if len(way) + 2 <= room else LIKELIEST_AT_LAST
    best = masked[0].topk(min(tried, masked.shape[1]))
    for token in best.indices[best.values > -torch.inf].tolist():
        after = place.position.advance(token)
        rest = None if after is None else place.finder.leads(after, way)
        if rest is not None and len(rest) + 2 <= room:
            good.append(token)
    return good
