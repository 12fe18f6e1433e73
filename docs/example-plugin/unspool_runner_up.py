"""Runner-up: now and then the second best token.

Greedy decoding falls into loops that one unexpected token breaks. So every k-th new token is the second most probable
one, where there is a second one that is allowed; all others are the most probable one. There is no noise.

    token number i  =  second of logits  if i mod k = 0 and it is not forbidden,  else  first of logits

Costs one forward pass a token, one row a branch, and a topk of 2 over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool import Growth, Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool import Step


class RunnerUp(Plugin):
    """Grow each row by its best token, and now and then by its second best."""

    row_local = True

    class Params(Parameters):
        """How often."""

        every: int = per_request(4, ge=2, description="Each so-manieth new token is the second best.")

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Choose one token a row."""
        rows = torch.arange(len(logits), device=logits.device)
        best = logits.topk(min(2, logits.shape[-1]), dim=-1)
        due = (step.length + 1) % step.values(self, "every") == 0
        second = due & (best.values[:, -1] > -torch.inf)
        return Growth(row=rows, token=torch.where(second, best.indices[:, -1], best.indices[:, 0]))
