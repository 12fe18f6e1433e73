"""DoLa: prefer what the last layer has learnt beyond an earlier one.

Facts enter a language model's prediction in its upper layers, while what is merely fluent is known early. For each
token the candidate layer whose distribution lies farthest from the final one is taken for premature, and the final
log-probabilities are contrasted with its own, among the tokens that the final layer finds plausible.

    q_j     =  softmax(head(hidden state of layer j)),   j in layers
    q       =  the q_j of the largest  JSD(p', q_j) = KL(p' | m) / 2 + KL(q_j | m) / 2,   m = (p' + q_j) / 2
    V       =  { t : p[t] >= alpha max p }
    out[t]  =  log p[t] - log q[t]   for t in V,   -inf  elsewhere                                (Chuang et al. 2023)

p' is what the model says, p the same as plugins before left it. The layer is chosen for every row by itself, never for
a batch. Costs no pass: for each layer and row a product with the output matrix (of many together) and a softmax over
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool_contrastive.contrast import contrast

if TYPE_CHECKING:
    from unspool.step import Step

_ROWS = 64
"""How many rows the output matrix is applied to at once: reading it costs what it does, however few they are."""


class Dola(Plugin):
    """Subtract a premature layer's log-probabilities from the final ones."""

    row_local = True

    class Params(Parameters):
        """Which layers may be premature."""

        main: ClassVar[str | None] = "layers"
        layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
            min_length=1,
            description="The candidates: 0 is the embedding, the model's depth the final layer, which is none.",
            examples=[[1], [0, 2], [0, 1, 2]],
        )
        alpha: float = per_request(
            0.1, gt=0, le=1, description="Least probability of a token, as a fraction of the best one's; 1 is greedy."
        )

    def __init__(self, params: BaseModel) -> None:
        super().__init__(params)
        self.hidden = self.params.layers

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Contrast every row with its own premature layer."""
        final = step.raw.to(logits).log_softmax(dim=-1)
        farthest = final.new_full((len(final), 1), -1.0)
        premature = torch.empty_like(final)
        for early in self._said_early(step, final):
            distance = divergence(final, early)
            premature = early.where(~(distance <= farthest), premature)  # a NaN is taken, and so is seen
            farthest = farthest.maximum(distance)
        contrast(logits, premature, step.values(self, "alpha").to(logits).unsqueeze(-1))

    def _said_early(self, step: Step, final: Tensor) -> Iterator[Tensor]:
        """Give the log-probabilities of each candidate layer, like those of the final one."""
        layers, at_once = self.params.layers, max(1, _ROWS // len(final))
        for first in range(0, len(layers), at_once):
            hidden = torch.cat([step.hidden(layer) for layer in layers[first : first + at_once]])
            yield from step.head(hidden).to(final).log_softmax(dim=-1).view(-1, *final.shape)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Give the Jensen-Shannon divergence of two distributions, in nats.

    Args:
        one: `[rows, vocab]` log-probabilities.
        other: likewise.

    Returns:
        `[rows, 1]`, from 0 to log 2.
    """
    p, q = one.exp(), other.exp()
    mean = (p + q).div_(2).log_()
    parts = [(share * (log - mean)).masked_fill_(share == 0, 0.0) for share, log in ((p, one), (q, other))]
    return (parts[0] + parts[1]).sum(dim=-1, keepdim=True) / 2
