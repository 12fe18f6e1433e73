"""How far distributions over the vocabulary are apart.

On a CPU a model's runner brings a kernel that reads each of them twice (`huggingface/distributions.cpp`), where plain
torch goes through a vocabulary a dozen times.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.float32, torch.bfloat16, torch.float16)


def divergence(p: Tensor, logits: Tensor) -> Tensor:
    """Give the Jensen-Shannon divergence of distributions, in nats.

        JSD(p, q)  =  KL(p | m) / 2 + KL(q | m) / 2  =  H(m) - (H(p) + H(q)) / 2,   m = (p + q) / 2         (Lin 1991)

    Args:
        p: `[n, vocab]` probabilities.
        logits: `[..., n, vocab]`, of q; some may be -inf.

    Returns:
        `[..., n]` in the dtype of p, from 0 to log 2 up to rounding; NaN where either has one.
    """
    if p.device.type == "cpu" and p.dtype == torch.float32 and logits.dtype in _HALVES:
        by_kernel = getattr(torch.ops.unspool, "divergence", None)
        if by_kernel is not None:
            found: Tensor = by_kernel(p, logits.reshape(-1, p.shape[-1]))
            return found.view(logits.shape[:-1])
    q = logits.to(p.dtype).softmax(dim=-1)
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def _entropy(p: Tensor) -> Tensor:
    return -(p.clamp(min=torch.finfo(p.dtype).tiny).log() * p).sum(dim=-1)
