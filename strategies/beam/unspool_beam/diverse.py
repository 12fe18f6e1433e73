"""Diverse beam search: several beam searches side by side, each kept from saying what those before it say.

The beams of plain beam search are one text with small changes. Here they are split into groups, and in each step the
groups choose one after another; a token costs a group `diversity` for each beam of an earlier group of the request that
takes it in this step. So the first group is plain beam search, and the others look elsewhere.

    value(beam of group g, token)  =  total(beam) + log p(token | beam)
                                      - diversity * |{beams of groups 1 .. g-1 that go on by the token in this step}|
    total(beam + token)            =  value(beam, token)                         (so penalties add up along a beam)

Vijayakumar et al. 2016, algorithm 1 with Hamming diversity. A beam "goes on by a token" that is among the best
`width / groups` candidates of its group that are no end token: what else will end a text is not known before the groups
after it choose. Texts are scored by their probability alone, or by their totals (`penalized_scores`, as transformers 4
does). The result has the best text of each group first, then the second of each.

Costs one forward pass a token with `width` rows, and a topk for each group; beams of several groups that agree are one
node, which is run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import hookimpl
from unspool.rank import best
from unspool_beam.pool import Pool
from unspool_beam.search import Search, candidates, refuse_more_than

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step


class DiverseBeamSearch(Search):
    """Search in groups, each penalised by what the groups before it take.

    A branch's stream, modulo the number of groups, is its group. Scores have two columns: the total that the search
    goes by, and the sum of log-probabilities.
    """

    score_columns = 2

    class Params(Search.Params):
        """How wide, in how many groups, how far apart, how it ends, and how lengths are weighed."""

        groups: int = Field(4, ge=1, le=1024, description="Groups that the beams are divided into; divides `width`.")
        diversity: float = Field(
            0.5, ge=0, le=1e4, description="What a token costs for each beam of an earlier group that takes it."
        )
        penalized_scores: bool = Field(
            False, description="`true`: score texts by totals with all penalties, as transformers 4 does."
        )

        @model_validator(mode="after")
        def _groups_divide_the_width(self) -> DiverseBeamSearch.Params:
            if self.width % self.groups:
                raise ValueError(f"groups must divide width: {self.groups} groups of {self.width} beams")
            return self

    def start(self, request: PreparedRequest) -> int:
        """Begin with a beam of each group on the prompt."""
        refuse_more_than(self.params.width, request)
        groups: int = self.params.groups
        return groups

    def open(self, request: PreparedRequest) -> list[Pool]:
        """Begin with no finished text in any group."""
        return [Pool(self._each) for _ in range(self.params.groups)]

    @property
    def _each(self) -> int:
        """Count the beams of a group."""
        each: int = self.params.width // self.params.groups
        return each

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Let one group of every request after the other take its best candidates."""
        groups, vocab = self.params.groups, logits.shape[-1]
        logprobs = self.logprobs(logits)
        totals = step.score[:, :1] + logprobs  # [rows, vocab]
        ends = _end_tokens(step, vocab)
        taken = totals.new_zeros(len(step.requests), vocab)
        counts = torch.tensor([candidates(request, self._each) for request in step.requests], device=totals.device)
        rows, tokens, scores, streams = [], [], [], []
        for group in range(groups):
            beams = _beams_of(step, group, groups, self._each)  # [requests, beams of the group]
            values = totals[beams.clamp(min=0)] - self.params.diversity * taken.unsqueeze(1)
            values = values.masked_fill((beams < 0).unsqueeze(-1), -torch.inf).flatten(1)
            most = min(int(counts.max()), values.shape[1])
            chosen = best(values, most)
            place = torch.arange(most, device=chosen.device)
            value = values.gather(1, chosen).masked_fill(place >= counts.unsqueeze(1), -torch.inf)
            row, token = beams.gather(1, chosen // vocab), chosen % vocab
            goes_on = (value > -torch.inf) & ~ends.gather(1, token)
            goes_on &= goes_on.cumsum(1) <= self._each
            taken.scatter_add_(1, token, goes_on.to(taken.dtype))
            kept = value > -torch.inf
            rows.append(row[kept])
            tokens.append(token[kept])
            scores.append(value[kept])
            streams.append((group + groups * place).expand_as(chosen)[kept])
        row, token = torch.cat(rows), torch.cat(tokens)
        score = torch.stack([torch.cat(scores), step.score[row, 1] + logprobs[row, token]], dim=1)
        return Growth(row=row, token=token, score=score, stream=torch.cat(streams))

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Score what ended, cut each group to its width, and end groups that cannot get better."""
        assert growth.score is not None and growth.stream is not None
        groups = self.params.groups
        search = (growth.request * groups + growth.stream % groups).tolist()
        pools = [pool for of_request in step.own(self) for pool in of_request]
        total = growth.score[:, 0 if self.params.penalized_scores else 1]
        self.settle(step, growth, search, pools, self._each, total)

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Put the best text of each group first, by score, then the second of each."""
        by_score = super().rank
        ranked = by_score(request, hypotheses)
        groups = [[h for h in ranked if h.stream % self.params.groups == g] for g in range(self.params.groups)]
        rounds = zip_longest(*(group[: self._each] for group in groups))
        return [h for texts in rounds for h in by_score(request, [text for text in texts if text is not None])]


def _end_tokens(step: Step, vocab: int) -> Tensor:
    """Mark the end tokens of each request: `[requests, vocab]` bool."""
    ends = torch.zeros(len(step.requests), vocab, dtype=torch.bool, device=step.grid.device)
    for number, request in enumerate(step.requests):
        ends[number, list(request.end_ids)] = True
    return ends


def _beams_of(step: Step, group: int, groups: int, most: int) -> Tensor:
    """Find the rows of one group: `[requests, most or fewer]` row numbers in their order, -1 where there is none."""
    member = (step.grid >= 0) & (step.stream[step.grid.clamp(min=0)] % groups == group)
    columns = (~member).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    return step.grid.gather(1, columns).masked_fill(~member.gather(1, columns), -1)
