"""XTC, exclude top choices: now and then, forbid all viable tokens but the least probable of them.

A token is viable from a probability of `threshold` on. With the given probability at each position, independently, the
row loses its viable tokens except the least probable one, so that the text leaves the beaten track and stays coherent.
Fewer than two viable tokens: nothing happens. (End tokens are tokens like any other.)

    with probability `probability`:  V = { t : p[t] >= threshold };  forbid V without argmin over V of p[t]
    (Weidmann 2024, known as p-e-w; of equal least probable ones the lowest token id stays)

Costs a softmax and a few comparisons over the vocabulary, and one uniform number a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class Xtc(Plugin):
    """Forbid the top choices at random positions."""

    row_local = True

    class Params(Parameters):
        """What counts as a top choice, and how often they go."""

        threshold: float = per_request(
            0.1, gt=0, le=0.5, description="The probability from which on a token is viable."
        )
        probability: float = per_request(0.5, ge=0, le=1, description="How often top choices are excluded.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Exclude each row's top choices where its coin says so."""
        threshold = step.values(self, "threshold").to(logits).unsqueeze(-1)
        uniform = step.uniform("xtc")
        chosen = uniform < step.values(self, "probability").to(uniform)
        probs = logits.softmax(dim=-1)
        viable = probs >= threshold
        survivor = probs.masked_fill(~viable, torch.inf).argmin(dim=-1, keepdim=True)
        excluded = viable.scatter(-1, survivor, False)
        logits.masked_fill_(excluded & chosen.unsqueeze(-1), -torch.inf)
