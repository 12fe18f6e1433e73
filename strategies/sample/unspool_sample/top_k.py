"""Top-k: keep the k most probable tokens.

All but the k largest logits are forbidden. Exactly k survive: of equal logits at the border the lowest token ids do.
A row with fewer possible tokens than k is left alone.

    keep t  iff  #{ s : logits[s] > logits[t], or logits[s] = logits[t] and s < t } < k      (Fan, Lewis, Dauphin 2018)

Costs one topk over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool.rank import best

if TYPE_CHECKING:
    from unspool.step import Step


class TopK(Plugin):
    """Forbid all but the k most probable tokens."""

    row_local = True

    class Params(Parameters):
        """How many to keep."""

        k: int = per_request(50, ge=1, description="How many tokens to keep.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what ranks below k in each row."""
        # The widest k, from the requests and not from the tensor: no wait for the device.
        params = [cast(TopK.Params, request.parameters[self.name]) for request in step.requests]
        widest = min(max(p.k for p in params), logits.shape[-1])
        k = step.values(self, "k").to(logits.device).unsqueeze(-1)
        values = logits.gather(-1, places := best(logits, widest))
        beyond = torch.arange(widest, device=logits.device) >= k
        logits.fill_(-torch.inf).scatter_(-1, places, values.masked_fill_(beyond, -torch.inf))
