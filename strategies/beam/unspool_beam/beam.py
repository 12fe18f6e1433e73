"""Beam search: keep the likeliest texts of each length, and return the best that ended.

Every step grows all of a request's beams by every token, takes the best candidates among all of them by their sums of
log-probabilities, and keeps the best `width` that have not ended. A candidate that ends counts only if it is among the
best `width` of its step; then it is scored by its length and goes into a pool of the best `width` finished texts. The
search is over when that pool cannot, or need not, get better (see `search.py`).

    candidates  =  the best of  (sum of log p of a beam)  +  log p(token | beam)      over all beams and tokens
    beams       <- the best `width` candidates that do not end
    finished    <- those that end, among the best `width` candidates, scored

Reddy 1977; as in transformers in all that can be seen: `max(2, 1 + end ids) * width` candidates, and `early_stopping`
`true`, `false` and `never`. Costs one forward pass a token with `width` rows, a log-softmax of them and a topk; the
prompt is run once, and forks copy nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import hookimpl
from unspool.rank import best
from unspool_beam.pool import Pool
from unspool_beam.search import Search, candidates
from unspool_beam.side_by_side import by_request

if TYPE_CHECKING:
    from unspool.request import PreparedRequest
    from unspool.step import Step


class BeamSearch(Search):
    """Grow the best candidates of a request, and keep the best that did not end."""

    class Params(Search.Params):
        """How wide, how it ends, how lengths are weighed, and whether candidates are drawn."""

        sample: bool = Field(
            False, description="Draw the candidates, without replacement, from the softmax of their sums."
        )

    def open(self, request: PreparedRequest) -> Pool:
        """Begin with no finished text."""
        return Pool(self.params.width)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Take the best candidates of each request, best first."""
        vocab = logits.shape[-1]
        totals = by_request(step, step.score[:, :1] + self.logprobs(logits))  # [requests, widest * vocab]
        merit = totals
        if self.params.sample:
            merit = totals + by_request(step, step.gumbel("beam"))  # Gumbel-top-k draws without replacement
        counts = [candidates(request, self.params.width) for request in step.requests]
        most = min(max(counts), totals.shape[1])
        chosen = best(merit, most)
        score = totals.gather(1, chosen)
        place = torch.arange(most, device=score.device)
        score = score.masked_fill(place >= torch.tensor(counts, device=score.device).unsqueeze(1), -torch.inf)
        score, order = score.sort(dim=-1, descending=True, stable=True)
        chosen = chosen.gather(1, order)
        row = step.grid.gather(1, chosen // vocab).flatten()
        stream = place.expand_as(chosen).flatten()
        kept = row >= 0
        return Growth(
            row=row[kept], token=(chosen % vocab).flatten()[kept], score=score.flatten()[kept], stream=stream[kept]
        )

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Score what ended, cut to the width, and end searches that cannot get better."""
        assert growth.score is not None
        self.settle(step, growth, growth.request.tolist(), step.own(self), self.params.width, growth.score)
