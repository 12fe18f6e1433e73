"""Contrastive search: of the likeliest tokens, take one that does not say again what was said.

Every token's candidates are the k likeliest. Each is run, and scored by its probability less its likeness to what
stands before it: the largest cosine between its hidden state and those of all earlier tokens, the prompt's included.
The best one is chosen, so that text does not run into the loops of greedy decoding, and no chance is involved.

    V      =  the k tokens of largest p(v | x), without those of probability 0
    token  =  argmax over v in V of  (1 - alpha) p(v | x)  -  alpha max over j of cos(h[v], h[x_j])    (Su et al. 2022)

p is the softmax of the transformed logits; h is the hidden state after the final norm. In equal scores the likelier
candidate wins, and of equally likely ones the lowest token id. With k = 1 or alpha = 0 it is greedy decoding.

Costs one forward pass of k rows a token, and one pass more at the end of the text: a row is held while its candidates
run below it as drafts, and the chosen one has run already when it becomes a row. The likeness takes k products with
the hidden states of the whole path, which are stored beside keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.likeness import nearest
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.rank import best

if TYPE_CHECKING:
    from unspool.request import PreparedRequest
    from unspool.step import Drafts, Step

LAST = -1
"""The layer that likeness is measured in: after the final norm."""


class ContrastiveSearch(Plugin):
    """Hold each row until its candidates have run, then grow it by the one that repeats least for its probability."""

    row_local = True
    holds = True
    hidden = (LAST,)
    path_hidden = (LAST,)

    class Params(Parameters):
        """How many candidates, and how much likeness counts."""

        main: ClassVar[str | None] = "top_k"
        top_k: int = Field(4, ge=1, le=1024, description="Candidates for each token; 1 is greedy decoding.")
        alpha: float = Field(
            0.6, ge=0, le=1, description="Weight of the likeness against the probability; 0 is greedy decoding."
        )

    def start(self, request: PreparedRequest) -> int:
        """Begin with one branch: there is one text."""
        if request.n > 1:
            raise InputError("n", request.n, "1: contrastive search draws nothing, so it has a single text")
        return 1

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Choose where the candidates have run; hang them where they have not."""
        if self.params.top_k == 1 or self.params.alpha == 0:  # nothing depends on what follows
            return Growth(row=torch.arange(len(logits), device=logits.device), token=logits.argmax(dim=-1))
        drafts = step.drafts(self)
        fresh = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        fresh[drafts.row] = False
        self._look(step, logits, fresh.nonzero().squeeze(1))
        return self._choose(step, logits, drafts)

    def _look(self, step: Step, logits: Tensor, rows: Tensor) -> None:
        """Hang the candidates of `rows` below them, best first."""
        if not len(rows):
            return
        if len(rows) < len(logits):
            logits = logits[rows]
        tokens = best(logits, self._most(logits))
        values = logits.gather(1, tokens)
        # What is forbidden is no candidate: it would be chosen for being unlike everything else.
        possible = (values - values[:, :1]).exp() > 0
        parents = step.node[rows].unsqueeze(1).expand_as(tokens)
        step.draft(parents[possible], tokens[possible])

    def _choose(self, step: Step, logits: Tensor, drafts: Drafts) -> Growth:
        """Grow each row whose candidates have run by the best of them."""
        row, token, node = drafts.row, drafts.token, drafts.node
        if not bool(drafts.ran.all()):  # one that is impossible has not
            ran = drafts.ran.to(row.device)
            row, token, node = row[ran], token[ran], node[ran]
        if not len(row):
            return Growth(row=row, token=token)
        shape = len(logits), self._most(logits)
        hidden, there = step.hidden(LAST, node).to(logits), None
        if len(row) < shape[0] * shape[1]:  # some rows have less, or none
            numbers = torch.arange(len(row), device=row.device)
            place = numbers - torch.searchsorted(row, row)  # among the candidates of its row, which are adjacent
            there = torch.zeros(shape, dtype=torch.bool, device=row.device)
            there[row, place] = True
            hidden, token = _spread(hidden, there), _spread(token, there)
        candidates, tokens = hidden.view(*shape, -1), token.view(shape)
        likeness = nearest(candidates, *step.path_hidden(LAST))
        confidence = logits.log_softmax(dim=-1).gather(1, tokens).exp()
        scores = (1 - self.params.alpha) * confidence - self.params.alpha * likeness
        if there is not None:
            scores.masked_fill_(~there, -torch.inf)
        chosen = tokens.gather(1, scores.argmax(dim=-1, keepdim=True)).squeeze(1)
        ready = torch.arange(len(logits), device=row.device) if there is None else there[:, 0].nonzero().squeeze(1)
        return Growth(row=ready, token=chosen[ready])

    def _most(self, logits: Tensor) -> int:
        """Say how many candidates a row has at most."""
        top_k: int = self.params.top_k
        return min(top_k, logits.shape[-1])


def _spread(values: Tensor, there: Tensor) -> Tensor:
    """Put values `[m, ...]` where there are to be any, row by row, and zeros elsewhere: `[rows, k, ...]`."""
    spread = values.new_zeros((*there.shape, *values.shape[1:]))
    spread[there] = values
    return spread
