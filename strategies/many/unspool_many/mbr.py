"""Minimum Bayes risk: draw samples, and return the text that would do best if any of them were right.

The likeliest text is often an odd one: its probability is tiny, and what most of the mass agrees on lies elsewhere.
So samples stand twice, as candidates and as evidence of what the right text may be. The candidate with the largest
expected utility, say overlap of characters, is the one in the middle of them.

    best  =  argmax over samples i of u(x_i),    u(x) = 1/N  sum over samples j of utility(x, x_j)
                                                              (Kumar & Byrne 2004; Eikema & Aziz 2020)

Ties go to the sample that was drawn first. The score of a text is its expected utility. Costs the forward passes of the
longest sample, a row a sample in each, then a call of the utility for each pair of different texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from unspool_many.draws import Draws, in_order, text_of
from unspool_many.functions import find, finite, named

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest

UTILITIES = "unspool.utilities"
"""The group of entry points that name utilities: `(hypothesis, reference) -> float`."""


class MinimumBayesRisk(Draws):
    """Return the samples that are most useful whatever sample is right."""

    class Params(Draws.Params):
        """How many samples, and how two texts are compared."""

        utility: Annotated[str, named(UTILITIES)] = Field(
            "chrf",
            description="How texts are compared: `chrf`, `token_f1`, `exact`, another entry point of "
            "`unspool.utilities`, or `module:attribute`.",
            examples=["chrf", "token_f1", "exact"],
        )

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Order the samples by their expected utility."""
        drawn = in_order(hypotheses)
        texts = [text_of(request, hypothesis) for hypothesis in drawn]
        counts = Counter(texts)
        expected = {text: self._expected(text, counts) for text in counts}
        return super().rank(request, [replace(h, score=expected[t]) for h, t in zip(drawn, texts, strict=True)])

    def _expected(self, text: str, references: Mapping[str, int]) -> float:
        name = self.params.utility
        utility, said = find(UTILITIES, name), f"the utility {name!r}"
        gained = [times * finite(utility(text, reference), said) for reference, times in references.items()]
        return math.fsum(gained) / sum(references.values())

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell the expected utilities of all samples, best first."""
        return {"expected_utilities": [hypothesis.score for hypothesis in hypotheses]}
