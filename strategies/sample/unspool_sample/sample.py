"""Ancestral sampling: draw the next token from the transformed distribution.

Every step grows each branch by one token, drawn with noise that is a pure function of seed, stream and position. The
noise is either Gumbel, one value a token, or uniform, one value a row. Both draw from exactly the same distribution; a
token of probability 0 is never drawn.

    gumbel:   token = argmax_t (logits[t] + G[t]),            G[t] standard Gumbel   (Gumbel 1954; Maddison 2014)
    uniform:  token = min { t : p[0] + ... + p[t] > U },      p = softmax(logits), U uniform in (0, 1)

Costs one forward pass a token and one row a branch; then `gumbel` hashes rows x vocabulary noise values, `uniform`
takes a softmax and a cumulative sum over the vocabulary in float64. Under `gumbel` a token keeps its noise while others
come and go, so that one seed gives near texts for near distributions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.step import Step


class Sample(Plugin):
    """Grow each row by a token drawn from its distribution."""

    row_local = True

    class Params(Parameters):
        """How the noise is drawn."""

        noise: Literal["gumbel", "uniform"] = Field(
            "gumbel",
            description="`gumbel`: argmax of logits plus Gumbel noise; `uniform`: inverse of the distribution.",
        )

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Draw one token a row, with the row's own noise."""
        if self.params.noise == "gumbel":
            token = step.sample("sample", logits)
        else:
            token = invert(logits, step.uniform("sample"))
        return Growth(row=torch.arange(len(logits), device=logits.device), token=token)


def invert(logits: Tensor, u: Tensor) -> Tensor:
    """Map uniform numbers to tokens by the inverse of the cumulative distribution.

    Args:
        logits: `[rows, vocab]`.
        u: `[rows]` float64 in [0, 1].

    Returns:
        `[rows]` int64: the first token whose cumulative probability exceeds `u`, never one of probability 0.
    """
    p = logits.to(torch.float64).softmax(dim=-1)
    # A parallel cumulative sum need not be flat over zeros: take them out, so that none can be hit.
    cumulative = p.cumsum(dim=-1).masked_fill_(p == 0, -1.0)
    total = cumulative.amax(dim=-1, keepdim=True)
    # u * total may round up to total, above which there is no token: then the last reachable one is meant.
    hit = (cumulative > u.unsqueeze(-1) * total) | (cumulative == total)
    return hit.to(torch.uint8).argmax(dim=-1)
