"""Beam search: keep the likeliest texts of each length, and return the best that ended.

Every step grows all of a request's beams by every token, takes the best candidates among all of them by their sums of
log-probabilities, and keeps the best `width` that have not ended. A candidate that ends counts only if it is among the
best `width` of its step; then it is scored by its length and goes into a pool of the best `width` finished texts. The
search is over when that pool cannot, or need not, get better.

    score(text)  =  sum of log p  /  length ** length_penalty                  (the end token counts in the length)
    gnmt         =  sum of log p  /  ((5 + length) / 6) ** length_penalty                        (Wu et al. 2016)

Reddy 1977; as in transformers in all that can be seen: `max(2, 1 + end ids) * width` candidates, and `early_stopping`
`true`, `false` and `never`. Costs one forward pass a token with `width` rows, a log-softmax of them and a topk; the
prompt is run once, and forks copy nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_beam.pool import Pool

if TYPE_CHECKING:
    from unspool.request import PreparedRequest
    from unspool.step import Step


class BeamSearch(Plugin):
    """Grow the best candidates of a request, and keep the best that did not end."""

    class Params(Parameters):
        """How wide, how it ends, and how lengths are weighed."""

        main: ClassVar[str | None] = "width"
        width: int = Field(4, ge=1, le=1024, description="Beams, and finished texts that are kept.")
        length_penalty: float = Field(
            1.0, ge=-10, le=10, description="Exponent of the length; above 0 it favours long texts, below 0 short ones."
        )
        length_form: Literal["power", "gnmt"] = Field(
            "power", description="What is raised to it: the length, or (5 + length) / 6."
        )
        early_stopping: bool | Literal["never"] = Field(
            False,
            description="`true`: over when `width` texts have ended; `false`: when the best beam, scored as it is, "
            "would not be among them; `never`: when it could not be at any length.",
        )
        sample: bool = Field(
            False, description="Draw the candidates, without replacement, from the softmax of their sums."
        )
        renormalize: bool = Field(
            True,
            description="`false`: take the transformed logits as log-probabilities as they are (transformers; put "
            "`log_softmax` first).",
        )

    def start(self, request: PreparedRequest) -> int:
        """Begin with one beam on the prompt."""
        if request.n > self.params.width:
            raise InputError("n", request.n, f"at most the width of the beam, {self.params.width}")
        return 1

    def open(self, request: PreparedRequest) -> Pool:
        """Begin with no finished text."""
        return Pool(self.params.width)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Take the best candidates of each request, best first."""
        logprobs = logits.log_softmax(dim=-1) if self.params.renormalize else logits
        totals = step.score[:, :1] + logprobs  # [rows, vocab]
        vocab = logits.shape[-1]
        there = step.grid >= 0
        beams = totals[step.grid.clamp(min=0)].masked_fill(~there.unsqueeze(-1), -torch.inf)
        candidates = beams.flatten(1)  # [requests, widest * vocab]
        merit = candidates
        if self.params.sample:
            noise = step.gumbel("beam")[step.grid.clamp(min=0)].flatten(1)
            merit = candidates + noise  # Gumbel-top-k draws without replacement
        counts = torch.tensor([self._candidates(request) for request in step.requests], device=logits.device)
        most = min(int(counts.max()), candidates.shape[1])
        chosen = best(merit, most)
        score = candidates.gather(1, chosen)
        score = score.masked_fill(torch.arange(most, device=score.device) >= counts.unsqueeze(1), -torch.inf)
        score, order = score.sort(dim=-1, descending=True, stable=True)
        chosen = chosen.gather(1, order)
        row = step.grid.gather(1, chosen // vocab).flatten()
        stream = torch.arange(most, device=row.device).expand_as(chosen).flatten()
        kept = row >= 0
        return Growth(
            row=row[kept], token=(chosen % vocab).flatten()[kept], score=score.flatten()[kept], stream=stream[kept]
        )

    def _candidates(self, request: PreparedRequest) -> int:
        """Count the candidates that leave `width` of them if every beam ends in every way that it can."""
        width: int = self.params.width
        return max(2, 1 + len(request.end_ids)) * width

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Score what ended, cut to the width, and end searches that cannot get better."""
        assert growth.score is not None
        width, pools = self.params.width, step.own(self)
        places: dict[int, int] = {}
        running: dict[int, list[int]] = {request: [] for request in range(len(step.requests))}
        score, drop = growth.score, growth.drop
        lengths = (step.length[growth.row.to(step.length.device)] + 1).tolist()
        for child, request in enumerate(growth.request.tolist()):
            place = places[request] = places.get(request, -1) + 1
            if growth.finish[child] is None:
                running[request].append(child)
                drop[child] = len(running[request]) > width
            elif place < width:
                score[child] /= self._weight(lengths[child])
                pools[request].add(float(score[child]))
            else:
                drop[child] = True
        for request, children in running.items():
            if children and self._is_over(step.requests[request], pools[request], growth, children[0], lengths):
                drop[children] = True

    def _weight(self, length: int) -> float:
        base = length if self.params.length_form == "power" else (5 + length) / 6
        return float(base**self.params.length_penalty)

    def _is_over(self, request: PreparedRequest, pool: Pool, growth: Growth, best: int, lengths: list[int]) -> bool:
        assert growth.score is not None
        early, longest = self.params.early_stopping, request.limits.max_new_tokens
        reached = longest if early == "never" and self.params.length_penalty > 0 else lengths[best]
        return pool.is_enough(float(growth.score[best]) / self._weight(reached), early)


def best(values: Tensor, count: int) -> Tensor:
    """Find the largest values of each row, of equal ones those that stand first, in an order that nothing else decides.

    `topk` alone breaks ties as it likes, and otherwise where more rows are in the batch.

    Args:
        values: `[n, m]`.
        count: how many, at most `m`.

    Returns:
        `[n, count]` int64, best first.
    """
    last = values.topk(count, dim=-1).values[:, -1:]
    above, level = values > last, values == last
    room = count - above.sum(dim=-1, keepdim=True)
    index = (above | (level & (level.cumsum(dim=-1) <= room))).nonzero()[:, 1].view(len(values), count)
    order = values.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    return index.gather(1, order)
