"""Locally typical sampling: keep the tokens whose surprise is nearest to the expected surprise.

People seldom say what is nearly certain or nearly impossible: a word carries about as much information as one expects.
Tokens are taken in the order of |surprise - entropy| until they hold mass p together. Tokens as near as the last one
taken stay as well.

    oddity[t] = | -log p[t] - H(p) |;   keep the least odd tokens up to mass p           (Meister et al. 2023)

Costs a log-softmax, a sort and a cumulative sum over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class Typical(Plugin):
    """Forbid all but the most typical tokens."""

    row_local = True

    class Params(Parameters):
        """The mass of the typical set."""

        p: float = per_request(0.9, gt=0, lt=1, description="The mass to keep.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what is odder than the typical set of each row."""
        p = step.values(self, "p").to(logits).unsqueeze(-1)
        logprobs = logits.log_softmax(dim=-1)
        probs = logprobs.exp()
        entropy = torch.special.entr(probs).sum(dim=-1, keepdim=True)
        oddity = (logprobs + entropy).abs()
        ranked, order = oddity.sort(dim=-1, stable=True)
        mass = probs.gather(-1, order).cumsum(dim=-1)
        last = (mass < p).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
        logits.masked_fill_(oddity > ranked.gather(-1, last), -torch.inf)
