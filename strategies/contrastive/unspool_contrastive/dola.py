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

from unspool.distributions import divergence, log_ratio
from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step

_HEAD_ROWS = 64
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
        each = torch.arange(len(logits), device=logits.device)
        premature = farthest = None
        for early in self._said_early(step):
            distances = divergence(step.raw, early)
            distance, layer = distances.max(dim=0)
            own = early[layer, each]
            if premature is None or farthest is None:
                premature, farthest = own, distance
            else:
                nearer = (distance <= farthest).unsqueeze(-1)  # a NaN is taken, and so is seen
                premature, farthest = torch.where(nearer, premature, own), farthest.maximum(distance)
        assert premature is not None, "there is at least one layer"
        log_ratio(logits, premature, step.values(self, "alpha").to(logits).unsqueeze(-1))

    def _said_early(self, step: Step) -> Iterator[Tensor]:
        """Give the logits of the candidate layers, of some at once: `[layers, rows, vocab]`."""
        layers, at_once = self.params.layers, max(1, _HEAD_ROWS // len(step.raw))
        for first in range(0, len(layers), at_once):
            hidden = torch.cat([step.hidden(layer) for layer in layers[first : first + at_once]])
            yield step.head(hidden).view(-1, *step.raw.shape)
