"""DRY, don't repeat yourself: penalise tokens that would extend a verbatim repetition.

Wherever the end of the path has occurred before, the token that followed there pays, the more the longer the match. A
match of `allowed_length` tokens pays the multiplier, each further token `base` times as much. Matches do not reach
across a sequence breaker, and a breaker itself never pays.

    L(t) = the longest m such that  path[-m:] + [t]  occurs on the path, without a breaker in path[-m:]
    L(t) >= allowed_length:   logits[t] <- logits[t] - multiplier * base ** (L(t) - allowed_length)
    (Weidmann 2024, known as p-e-w)

Matches are followed up to 50 tokens: at that length the penalty is beyond all logits. The prompt
belongs to the path. Costs two passes over the path, then one gather for each token of a match at the few places where
the last token occurred before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, TokenId, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step

LONGEST = 50
"""Matches are not followed any further."""


class Dry(Plugin):
    """Lower the logits of tokens that would extend a repetition."""

    row_local = True

    class Params(Parameters):
        """How repetitions are found and what they cost."""

        main: ClassVar[str | None] = "multiplier"
        multiplier: float = per_request(0.8, ge=0, le=100, description="The penalty at the allowed length; 0 is off.")
        base: float = per_request(1.75, ge=1, le=4, description="The factor for each further token of a match.")
        allowed_length: int = per_request(2, ge=1, le=LONGEST, description="The shortest match that is penalised.")
        breakers: tuple[TokenId, ...] = Field(
            (), description="Token ids that matches do not reach across: line breaks, colons, quotes, turn markers."
        )

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Penalise what would extend each row's longest repetition."""
        vocab = logits.shape[-1]
        row, token, length = self._matches(*step.paths())
        allowed = step.values(self, "allowed_length").to(row.device)[row]
        base, multiplier = (step.values(self, name).to(logits)[row] for name in ("base", "multiplier"))
        pays = (length >= allowed) & (token < vocab)
        penalty = multiplier * base ** (length - allowed).clamp(min=0)
        # base >= 1: the longest match of a token is its largest penalty.
        owed = torch.zeros_like(logits).view(-1)
        owed.scatter_reduce_(0, row[pays] * vocab + token[pays], penalty[pays], "amax")
        logits.sub_(owed.view_as(logits))

    def _matches(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find where the end of each path occurred before: row, the token that followed there, length of the match."""
        breakers = torch.tensor(self.params.breakers, dtype=ids.dtype, device=ids.device)
        age = torch.arange(ids.shape[-1], device=ids.device)
        back = ids.gather(-1, (lengths.unsqueeze(-1) - 1 - age).clamp(min=0))  # back[:, 0] is the last token
        same = (back == back[:, :1]) & (age < lengths.unsqueeze(-1)) & ~torch.isin(back, breakers)
        same[:, 0] = False
        row, shift = same.nonzero(as_tuple=True)
        length = torch.ones_like(row)
        live = torch.arange(len(row), device=ids.device)
        for m in range(1, min(LONGEST, ids.shape[-1])):
            # The list of live matches shrinks quickly, which is worth a wait for the device at each turn.
            live = live[shift[live] + m < lengths[row[live]]]
            tail = back[row[live], m]
            live = live[(back[row[live], shift[live] + m] == tail) & ~torch.isin(tail, breakers)]
            if not len(live):
                break
            length[live] += 1
        token = back[row, shift - 1]
        lawful = ~torch.isin(token, breakers)
        return row[lawful], token[lawful], length[lawful]
