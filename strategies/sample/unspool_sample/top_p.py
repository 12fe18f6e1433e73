"""Top-p, or nucleus sampling: keep the smallest set of most probable tokens that holds mass p.

Tokens are taken in the order of their probability until they hold p together; all others are forbidden. The most
probable token always stays, and equal probabilities are taken lowest token id first. p = 1 changes nothing at all.

    keep t  iff  sum of p[s] over all s before t in that order  <  p           (Holtzman et al. 2020)

Costs a softmax and a topk over the vocabulary, a sort where the nucleus is wide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool.rank import best_until

if TYPE_CHECKING:
    from unspool.step import Step


_NEAR_ONE = 0.999
"""What is larger may be 1 in the working dtype. From the requests and not from the tensor: no wait for the device."""


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
        probs = logits.softmax(dim=-1)

        def held(places: Tensor) -> Tensor:
            return probs.gather(-1, places).cumsum(dim=-1)

        def enough(ranked: Tensor, places: Tensor) -> Tensor:
            full = (held(places) >= p) & (ranked > ranked[:, -1:])
            return full.any(dim=-1) | (ranked[:, -1] == -torch.inf) | (p[:, 0] >= 1)

        ranked, places = best_until(logits, enough)
        beyond = held(places)[:, :-1] >= p
        ranked[:, 1:].masked_fill_(beyond, -torch.inf)
        # Rounding can make the mass reach 1 before the last token, so p = 1 is not left to the sum.
        may_keep_all = any(cast(TopP.Params, request.parameters[self.name]).p > _NEAR_ONE for request in step.requests)
        whole = logits.clone() if may_keep_all else logits
        logits.fill_(-torch.inf).scatter_(-1, places, ranked)
        if may_keep_all:
            logits.copy_(torch.where(p < 1, logits, whole))
