"""How far distributions over the vocabulary are apart, and what one says beyond another.

On a CPU a model's runner brings a kernel that reads each of them two or three times (`huggingface/distributions.cpp`),
where plain torch goes through a vocabulary a dozen times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.kernels import ALL, by_kernel


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Give the Jensen-Shannon divergence of distributions, in nats.

        JSD(p, q)  =  KL(p | m) / 2 + KL(q | m) / 2  =  H(m) - (H(p) + H(q)) / 2,   m = (p + q) / 2         (Lin 1991)

    Args:
        logits: `[n, vocab]`, of p; some may be -inf.
        others: `[..., n, vocab]`, of q, in the same dtype.

    Returns:
        `[..., n]` float32, or float64 of such logits: from 0 to log 2 up to rounding; NaN where either has one.
    """
    operator = by_kernel("divergence", logits, *ALL)
    if operator is not None:
        found: Tensor = operator(logits, others.reshape(-1, logits.shape[-1]))
        return found.view(others.shape[:-1])
    working = torch.promote_types(logits.dtype, torch.float32)
    p, q = logits.to(working).softmax(dim=-1), others.to(working).softmax(dim=-1)
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def _entropy(p: Tensor) -> Tensor:
    return -(p.clamp(min=torch.finfo(p.dtype).tiny).log() * p).sum(dim=-1)


def log_ratio(
    logits: Tensor,
    others: Tensor,
    alpha: Tensor,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Turn logits into what they say beyond others, in place, among the tokens that they find plausible.

    Where both find a token improbable the ratio of their probabilities means nothing, and it may be huge. So only
    tokens count that have at least a fraction `alpha` of the best one's probability; the best one always does.

        V       =  { t : p[t] >= alpha max p }                                                       (Li et al. 2022)
        out[t]  =  gain log p[t] - weight log q[t]   for t in V,   -inf  elsewhere

    Args:
        logits: `[rows, vocab]`, of p. What is forbidden stays forbidden.
        others: `[rows, vocab]`, of q, in any dtype.
        alpha: `[rows, 1]` in (0, 1].
        gain: `[rows, 1]` above 0; None: 1.
        weight: likewise.
    """
    operator = by_kernel("log_ratio_", logits, torch.float32)
    if operator is not None and others.dtype in ALL and logits.is_contiguous():
        one = torch.ones_like(alpha)
        operator(logits, others, alpha, one if gain is None else gain, one if weight is None else weight)
        return
    least = logits.amax(dim=-1, keepdim=True) + alpha.log()
    implausible = logits < least.clamp_(min=torch.finfo(logits.dtype).min)  # all of a row where all is forbidden
    said = torch.log_softmax(logits, dim=-1, out=logits)
    if gain is not None:
        said.mul_(gain)
    against = others.to(logits).log_softmax(dim=-1)
    said.sub_(against if weight is None else weight * against)
    said.masked_fill_(implausible, -torch.inf)  # where p is 0 it may have become NaN, by a q of 0 or in a dead row
