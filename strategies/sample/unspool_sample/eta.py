"""Eta sampling: forbid tokens below a probability that falls where the model is unsure.

A fixed floor (epsilon sampling) cuts too much where many tokens are plausible. Here the floor is lowered by the entropy
of the distribution. Where nothing passes, the most probable tokens stay.

    keep t  iff  p[t] >= min(epsilon, sqrt(epsilon) * exp(-H(p)))  or  p[t] = max p      (Hewitt, Manning, Liang 2022)

Costs a softmax, an entropy and a comparison over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class Eta(Plugin):
    """Forbid tokens below a probability that depends on the entropy."""

    row_local = True

    class Params(Parameters):
        """The least probability of a sure distribution."""

        epsilon: float = per_request(
            3e-4, gt=0, lt=1, description="The floor where the model is sure; else it is lower."
        )

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what lies below each row's own floor."""
        epsilon = step.values(self, "epsilon").to(logits).unsqueeze(-1)
        probs = logits.softmax(dim=-1)
        entropy = torch.special.entr(probs).sum(dim=-1, keepdim=True)
        least = torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp())
        best = logits.amax(dim=-1, keepdim=True)
        logits.masked_fill_((probs < least) & (logits < best), -torch.inf)
