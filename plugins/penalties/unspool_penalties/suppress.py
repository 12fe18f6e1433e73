"""Suppressed tokens: forbid chosen tokens always, or at the beginning.

Both act before samplers wherever the config lists them, so that a forbidden token takes no place in a top-k.
`begin_suppress_tokens` acts on one new token alone, the first one unless told otherwise.

    logits[t] <- -inf   for chosen t

Costs one write a token and row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, TokenIds, hookimpl
from unspool_penalties.token_ids import index

if TYPE_CHECKING:
    from unspool.step import Step


class SuppressTokens(Plugin):
    """Forbid tokens everywhere."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The tokens."""

        token_ids: TokenIds = Field(description="Token ids that are never chosen.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid the tokens in every row."""
        logits.index_fill_(-1, index(self.params.token_ids, logits, self.name), -torch.inf)


class BeginSuppressTokens(Plugin):
    """Forbid tokens at the beginning."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The tokens and the place."""

        main: ClassVar[str | None] = "token_ids"
        token_ids: TokenIds = Field(description="Token ids that may not begin the text.")
        position: int = Field(0, ge=0, description="How many new tokens stand before; 1 after a forced first token.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid the tokens in rows at that position."""
        chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        chosen[index(self.params.token_ids, logits, self.name)] = True
        logits.masked_fill_((step.length == self.params.position).unsqueeze(-1) & chosen, -torch.inf)
