"""Top-p, or nucleus sampling: keep the smallest set of most probable tokens that holds mass p.

Tokens are taken in the order of their probability until they hold p together; all others are forbidden. The most
probable token always stays, and equal probabilities are taken lowest token id first. p = 1 changes nothing at all.

    keep t  iff  sum of p[s] over all s before t in that order  <  p           (Holtzman et al. 2020)

Costs a sort, a softmax and a cumulative sum over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class TopP(Plugin):
    """Forbid all but the nucleus of mass p."""

    row_local = True

    class Params(Parameters):
        """The mass of the nucleus."""

        p: float = per_request(0.9, gt=0, le=1, description="The mass to keep; 1 keeps everything.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what lies beyond the nucleus of each row."""
        p = step.values(self, "p").to(logits).unsqueeze(-1)
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ranked.softmax(dim=-1).cumsum(dim=-1)
        # Rounding can make the mass reach 1 before the last token, so p = 1 is not left to the sum.
        beyond = (mass >= p) & (p < 1)
        drop = torch.zeros_like(beyond).scatter_(-1, order[:, 1:], beyond[:, :-1])
        logits.masked_fill_(drop, -torch.inf)
