"""A contrast: what one distribution says beyond another, among the tokens that the first finds plausible.

Where both find a token improbable the ratio of their probabilities means nothing, and it may be huge. So only tokens
count that have at least a fraction `alpha` of the best one's probability; the best one always does.

    V       =  { t : p[t] >= alpha max p }                                                           (Li et al. 2022)
    out[t]  =  gain log p[t] - weight log q[t]   for t in V,   -inf  elsewhere
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrast(
    logits: Tensor,
    against: Tensor,
    alpha: Tensor,
    gain: Tensor | float | None = None,
    weight: Tensor | float | None = None,
) -> None:
    """Turn logits into their contrast with others, in place.

    Args:
        logits: `[rows, vocab]`, of p. What is forbidden stays forbidden.
        against: `[rows, vocab]`, log-probabilities of q.
        alpha: `[rows, 1]` in (0, 1].
        gain: above 0, a number or `[rows, 1]`; None: 1.
        weight: likewise.
    """
    least = logits.amax(dim=-1, keepdim=True) + alpha.log()
    implausible = logits < least.clamp_(min=torch.finfo(logits.dtype).min)  # all of a row where all is forbidden
    said = torch.log_softmax(logits, dim=-1, out=logits)
    if gain is not None:
        said.mul_(gain)
    said.sub_(against if weight is None else weight * against)
    said.masked_fill_(implausible, -torch.inf)  # where p is 0 it may have become NaN, by a q of 0 or in a dead row
