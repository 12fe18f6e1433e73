"""Exponential decay length penalty: make end tokens likelier and likelier after a given length.

From `start` new tokens on, each end token's logit grows by its own size times an exponential of how far the text has
run over. So long texts end at a natural place soon after, where a limit would cut them. Forbidden end tokens stay
forbidden.

    over = length - start > 0:   logits[e] <- logits[e] + |logits[e]| * (factor ** over - 1)   for end tokens e
    (as in transformers)

Costs one gather and one scatter a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step

STEEPEST = 1e9
"""Growth stops here, far beyond all other logits and far below the largest float."""


class ExponentialDecayLengthPenalty(Plugin):
    """Raise the logits of end tokens exponentially."""

    row_local = True

    class Params(Parameters):
        """Where the growth starts and how fast it is."""

        start: int = per_request(ge=0, description="New tokens after which end tokens begin to gain.")
        factor: float = per_request(1.1, gt=0, le=100, description="Growth for each further token; below 1 they lose.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Raise each row's end tokens by how far it has run over."""
        widest = max(len(request.end_ids) for request in step.requests)
        table = [[*request.end_ids, *[-1] * (widest - len(request.end_ids))] for request in step.requests]
        ends = torch.tensor(table, dtype=torch.int64, device=logits.device)[step.request]
        over = (step.length - step.values(self, "start").to(step.length)).clamp(min=0).to(logits)
        growth = (step.values(self, "factor").to(logits) ** over).clamp(max=STEEPEST) - 1
        real = (ends >= 0) & (ends < logits.shape[-1])
        ends = ends.where(real, 0)
        scores = logits.gather(-1, ends)
        gain = (scores.abs() * growth.unsqueeze(-1)).where(real & scores.isfinite(), 0.0)
        logits.scatter_add_(-1, ends, gain)
