"""No-repeat n-gram: forbid every token that would complete an n-gram for the second time.

The last n - 1 tokens of the path are looked up along the path, the prompt included; whatever followed them before may
not follow them again. With n = 1 no token may occur twice. It may forbid all tokens, end tokens too, which ends the
branch.

    forbid t  iff  some i has  path[i : i + n] = path[-(n - 1) :] + [t]          (Paulus, Xiong and Socher 2018)

Costs n - 1 comparisons over the path and a scatter into the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.step import Step


class NoRepeatNgram(Plugin):
    """Forbid tokens that would repeat an n-gram."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The length of what may not be repeated."""

        n: int = Field(3, ge=1, description="The length of an n-gram that may occur only once.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what followed each row's last n - 1 tokens before."""
        n, vocab = self.params.n, logits.shape[-1]
        ids, lengths = step.paths()
        starts = ids.shape[-1] - n + 1
        if starts < 1:
            return
        start = torch.arange(starts, device=ids.device)
        # A whole n-gram must lie inside the path; a path shorter than n has none.
        repeats = start + n <= lengths.unsqueeze(-1)
        for offset in range(n - 1):
            at = (lengths - (n - 1) + offset).clamp(min=0).unsqueeze(-1)
            repeats &= ids[:, offset : offset + starts] == ids.gather(-1, at)
        follower = ids[:, n - 1 :].clamp(max=vocab).masked_fill(~repeats, vocab)
        banned = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
        logits.masked_fill_(banned.scatter_(-1, follower, True)[:, :vocab], -torch.inf)
