"""Top-n-sigma: keep the tokens whose logits lie within n standard deviations of the largest.

Logits are a Gaussian heap of noise with a few informative ones far above it. The rule separates the two in logit space,
so it keeps the same tokens at any temperature. Forbidden tokens take no part in the deviation.

    keep t  iff  logits[t] >= max logits - n * sigma,   sigma^2 = mean (logits - mean)^2     (Tang et al. 2024)

Costs three reductions and a comparison over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class TopNSigma(Plugin):
    """Forbid tokens far below the largest logit, by the spread of the row."""

    row_local = True

    class Params(Parameters):
        """How many deviations."""

        n: float = per_request(1.0, gt=0, le=100, description="How many standard deviations below the largest logit.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what lies further below each row's maximum."""
        n = step.values(self, "n").to(logits).unsqueeze(-1)
        allowed = logits > -torch.inf
        count = allowed.sum(dim=-1, keepdim=True)
        mean = logits.where(allowed, 0.0).sum(dim=-1, keepdim=True) / count
        sigma = ((logits - mean).where(allowed, 0.0).square().sum(dim=-1, keepdim=True) / count).sqrt()
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) - n * sigma, -torch.inf)
