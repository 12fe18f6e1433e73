"""Min-p: keep the tokens that are at least a fraction p as probable as the most probable one.

Where the model is sure, few tokens pass; where it is not, many do. The most probable token always passes. In logits
the rule needs no normalisation.

    keep t  iff  p[t] >= p * max p,   that is   logits[t] >= max logits + log p        (Nguyen et al. 2024)

Costs a maximum and a comparison over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class MinP(Plugin):
    """Forbid tokens that are too improbable beside the best."""

    row_local = True

    class Params(Parameters):
        """The fraction."""

        p: float = per_request(0.05, ge=0, le=1, description="The least probability, as a fraction of the largest one.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what lies below the fraction of each row's maximum."""
        least = logits.amax(dim=-1, keepdim=True) + step.values(self, "p").to(logits).log().unsqueeze(-1)
        logits.masked_fill_(logits < least, -torch.inf)
