"""Epsilon sampling: forbid tokens less probable than epsilon.

The tail of a language model is smoothing rather than language, so everything below a fixed probability goes. Where
nothing passes, the most probable tokens stay.

    keep t  iff  p[t] >= epsilon  or  p[t] = max p                  (Hewitt, Manning and Liang 2022)

Costs a log-softmax and a comparison over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class Epsilon(Plugin):
    """Forbid tokens below a fixed probability."""

    row_local = True

    class Params(Parameters):
        """The least probability."""

        epsilon: float = per_request(3e-4, gt=0, lt=1, description="The least probability that a token needs.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what lies below epsilon in each row."""
        least = step.values(self, "epsilon").to(logits).log().unsqueeze(-1)
        best = logits.amax(dim=-1, keepdim=True)
        logits.masked_fill_((logits.log_softmax(dim=-1) < least) & (logits < best), -torch.inf)
