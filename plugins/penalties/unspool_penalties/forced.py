"""Forced tokens: the first or the last new token is one of a few.

Every other token is forbidden at that position; those that are left keep their logits. A force yields to what was
forbidden before: where none of its tokens is possible (a grammar listed earlier, `min_new_tokens`) the row is left
alone, so a force never ends a branch.

    at its position, if some chosen t has logits[t] > -inf:   logits[s] <- -inf  for all s not chosen

Costs one masked write over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, TokenIds, hookimpl
from unspool_penalties.token_ids import index

if TYPE_CHECKING:
    from unspool.step import Step


class ForcedBos(Plugin):
    """Force the first new token."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The tokens."""

        token_ids: TokenIds = Field(description="Token ids of which one begins the text.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Leave only the tokens in rows that stand at the prompt."""
        force(logits, step.length == 0, self.params.token_ids, self.name)


class ForcedEos(Plugin):
    """Force the last new token that `max_new_tokens` allows."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The tokens."""

        token_ids: TokenIds = Field(description="Token ids of which one stands at the limit, if the text gets there.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Leave only the tokens in rows whose next token is the last one."""
        limits = [request.limits.max_new_tokens for request in step.requests]
        limit = torch.tensor(limits, device=logits.device)[step.request]
        force(logits, step.length + 1 == limit, self.params.token_ids, self.name)


def force(logits: Tensor, rows: Tensor, token_ids: Sequence[int], plugin: str) -> None:
    """Forbid, in place, all but `token_ids` in the chosen `rows` `[rows]` bool where one of them is possible."""
    wanted = index(token_ids, logits, plugin)
    others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others[wanted] = False
    rows = rows & (logits[:, wanted] > -torch.inf).any(dim=-1)
    logits.masked_fill_(rows.unsqueeze(-1) & others, -torch.inf)
