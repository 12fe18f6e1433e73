"""Drafts of a companion: a smaller model, or the target's own first layers, says what it would do.

The companion runs ahead, a token a pass, and at each node drafts what the whole pipeline would choose were the
companion the target: the same transforms, the same strategy, the same noise. So a sampled text is guessed as well as a
greedy one. Under a strategy that cannot be asked row by row (beams) it drafts the companion's likeliest token. With a
width above 1 the likeliest alternatives hang beside it, and the likeliest of all nodes go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.step import Step

LIKELY = 0.75
"""How sure of its next draft the companion is taken to be before it has run."""


class CompanionDrafts(Plugin):
    """The base of drafters that ask a companion."""

    row_local = True

    class Params(Parameters):
        """How long and wide the guesses are."""

        length: int = Field(8, ge=1, le=64, description="Most drafts on a path: passes of the companion.")
        width: int = Field(1, ge=1, le=16, description="Nodes of each depth, and drafts below each; 1: a chain.")
        adapt: bool = Field(True, description="Draft only as long as it is worth the time; `false`: always `length`.")

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Run ahead of the target."""
        params, budget = self.params, step.budget
        rows, nodes = torch.arange(len(step.node), device=step.node.device), step.node
        chance = torch.ones(len(nodes), dtype=torch.float64, device=nodes.device)
        hung = torch.zeros_like(budget)
        for _ in range(params.length):
            room = (nodes >= 0) & (hung[rows] < budget[rows])
            rows, nodes, chance = rows[room], nodes[room], chance[room]
            if not len(nodes) or (params.adapt and not step.pays(nodes, [LIKELY] * len(nodes), self.name)):
                return
            logits = step.companion(self.name, nodes)
            token = self._choose(step, rows, nodes, logits)  # [nodes, width], what it would choose first
            p = logits.to(torch.float64).softmax(dim=-1).gather(1, token.clamp(min=0))
            sure = p / 2  # of alternatives; what it would choose itself is likelier than its probability
            sure[:, 0] += 0.5
            parents = nodes.repeat_interleave(token.shape[1])
            drafts = step.draft(
                parents.where(token.flatten() >= 0, -1),
                token.flatten(),
                confidence=sure.flatten() if params.adapt else None,
            )
            hung.index_add_(0, rows.repeat_interleave(token.shape[1]), torch.ones_like(drafts))
            rows, nodes, chance = self._frontier(
                rows.repeat_interleave(token.shape[1]), drafts, (chance.unsqueeze(1) * sure).flatten()
            )

    def _choose(self, step: Step, rows: Tensor, nodes: Tensor, logits: Tensor) -> Tensor:
        """Give the tokens to draft below each node: `[nodes, width]`, -1 for none."""
        likely = logits.topk(min(self.params.width, logits.shape[-1]), dim=-1).indices
        if not step.proposes:
            return likely
        chosen = step.propose(rows, nodes, logits).unsqueeze(1)
        others = likely.masked_fill(likely == chosen, -1)
        order = (others < 0).to(torch.int8).argsort(dim=1, stable=True)
        return torch.cat([chosen, others.gather(1, order)], dim=1)[:, : likely.shape[1]]

    def _frontier(self, rows: Tensor, nodes: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the likeliest `width` nodes of each row."""
        order = chance.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows, nodes, chance = rows[order], nodes[order], chance[order]
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        keep = place < self.params.width
        return rows[keep], nodes[keep], chance[keep]
