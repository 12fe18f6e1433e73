"""Top-H: keep as much mass as a bounded entropy allows.

Tokens are taken in the order of their probability as long as the entropy of what was taken, normalised again, stays
within a fraction alpha of the whole distribution's entropy. So the unsure model explores and the sure one does not.
The most probable token always stays, and alpha = 1 changes nothing.

    keep the longest head S of that order with  H(q_S) <= alpha * H(p),   q_S = p / p(S) on S
    where  H(q_S) = -(sum over S of p log p) / p(S) + log p(S)        (Baghaei Potraghloo et al., NeurIPS 2025)

Costs a sort, a softmax and two cumulative sums over the vocabulary. A departure by choice: the `top_h` of transformers
compares the sum of -p log p over S, not normalised again, with alpha * H(p), and p is the best 100 tokens only; on flat
distributions it keeps far more. `rule: transformers` does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step

CANDIDATES = 100
"""How many tokens transformers' rule looks at."""


class TopH(Plugin):
    """Forbid tokens that would lift the entropy above its bound."""

    row_local = True

    class Params(Parameters):
        """The bound, and how the entropy is measured."""

        main: ClassVar[str | None] = "alpha"
        alpha: float = per_request(0.4, gt=0, le=1, description="The entropy to keep, as a fraction of the model's.")
        rule: Literal["paper", "transformers"] = Field(
            "paper", description="Measure the kept tokens' entropy as the paper defines it, or as transformers does."
        )

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what comes after the longest head within the bound."""
        alpha = step.values(self, "alpha").to(logits).unsqueeze(-1)
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        if self.params.rule == "paper":
            probs = ranked.softmax(dim=-1)
            mass, partial = probs.cumsum(dim=-1), torch.special.entr(probs).cumsum(dim=-1)
            # Rounding must not drop a token where the bound is the whole entropy.
            keep = (partial / mass + mass.log() <= alpha * partial[:, -1:]) | (alpha >= 1)
        else:
            probs = ranked[:, :CANDIDATES].softmax(dim=-1)
            partial = torch.special.entr(probs).cumsum(dim=-1)
            keep = torch.zeros_like(ranked, dtype=torch.bool)
            keep[:, :CANDIDATES] = partial <= alpha * partial[:, -1:]
        keep[:, 0] = True
        logits.masked_fill_(~torch.zeros_like(keep).scatter_(-1, order, keep), -torch.inf)
