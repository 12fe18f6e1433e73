"""Best of n: draw samples, and return those that a scorer likes best.

A model's sample is now good, now bad, and telling which is easier than writing a good one. So texts are drawn
independently, and a scorer (their probability, a reward model, a test that is run) says which to return.

    best  =  argmax over samples i of s(x_i),     x_i ~ pipeline      (Nichols et al. 2020; Cobbe et al. 2021)

Ties go to the sample that was drawn first. The score of a text is what the scorer said. Costs the forward passes of the
longest sample, a row a sample in each, and one call of the scorer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from unspool_many.draws import Draws, in_order
from unspool_many.functions import find, finite, named

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest

SCORERS = "unspool.scorers"
"""The group of entry points that name scorers: `(request, hypotheses) -> scores`."""


class BestOf(Draws):
    """Return the samples that score best."""

    class Params(Draws.Params):
        """How many samples, and what scores them."""

        scorer: Annotated[str, named(SCORERS)] = Field(
            "mean_logprob",
            description="What they are ranked by: `mean_logprob`, `logprob`, another entry point of `unspool.scorers`, "
            "or `module:attribute`.",
            examples=["mean_logprob", "logprob"],
        )

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Order the samples by what the scorer says of them."""
        drawn = in_order(hypotheses)
        scorer = self.params.scorer
        scores = [finite(score, f"the scorer {scorer!r}") for score in find(SCORERS, scorer)(request, drawn)]
        if len(scores) != len(drawn):
            raise ValueError(f"the scorer {scorer!r} gave {len(scores)} scores for {len(drawn)} texts")
        scored = [replace(hypothesis, score=score) for hypothesis, score in zip(drawn, scores, strict=True)]
        return super().rank(request, scored)

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell the scores of all samples, best first."""
        return {"scores": [hypothesis.score for hypothesis in hypotheses]}
