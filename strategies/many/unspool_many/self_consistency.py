"""Self-consistency: draw several lines of reasoning, and return the answer that most of them come to.

A hard question has many ways to its right answer, and wrong ways end in all sorts of places. So texts are drawn
independently, the answer is read out of each, and the answers vote; which words led to them does not count.

    answer  =  argmax_a  sum over samples i with a_i = a of w_i                              (Wang et al. 2022)
    w_i = 1,   or   exp(mean log-probability of sample i)   where votes are weighted

The likeliest text of the winning answer comes first, then the others that came to it, then those of the next answer;
texts without an answer come last. Of answers with as many votes, the one with the likeliest text wins. A text's score
is its answer's share of all votes. Costs the forward passes of the longest sample, a row a sample in each.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import regex  # type: ignore[import-untyped]
from pydantic import AfterValidator, Field

from unspool_many.draws import Draws, in_order, logprob, mean_logprob, text_of

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest

NUMBER = r"(?P<sign>(?<!\w)-)?[$€£¥]?(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<fraction>[0-9]+))?"
PATIENCE = 1.0
"""Seconds for a pattern and a text. A careless pattern may need years, while all other requests wait."""


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return pattern


class SelfConsistency(Draws):
    """Return the samples whose answer most samples share."""

    class Params(Draws.Params):
        """How many samples, how an answer is found in a text, and how votes count."""

        pattern: Annotated[str, AfterValidator(_compiles)] | None = Field(
            None,
            description="A regular expression whose last match in the text is the answer: its first group, or the "
            "whole match if it has none. Without it the last number is the answer.",
            examples=[None, r"([0-9]) [0-9]+$", "1|2"],
        )
        weighted: bool = Field(False, description="A vote counts as much as its text is likely, by token.")
        normalize: bool = Field(
            True, description="Answers that differ in case, spaces, a final full stop or the form of a number agree."
        )

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Order the samples by the votes for their answers."""
        drawn = in_order(hypotheses)
        likeliest = max(map(mean_logprob, drawn))  # of weights only ratios count, and exp shall not underflow
        weights = [math.exp(mean_logprob(h) - likeliest) if self.params.weighted else 1.0 for h in drawn]
        voters: dict[str | None, list[Hypothesis]] = {}
        votes: dict[str | None, list[float]] = {}
        for hypothesis, weight in zip(drawn, weights, strict=True):
            answer = self.answer(text_of(request, hypothesis))
            voters.setdefault(answer, []).append(hypothesis)
            votes.setdefault(answer, []).append(weight)
        share = {answer: math.fsum(votes[answer]) / math.fsum(weights) for answer in voters}
        best = {answer: max(map(logprob, voters[answer])) for answer in voters}
        order = sorted(voters, key=lambda answer: (answer is None, -share[answer], -best[answer]))
        return [
            replace(hypothesis, score=0.0 if answer is None else share[answer])
            for answer in order
            for hypothesis in sorted(voters[answer], key=logprob, reverse=True)
        ]

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell the answers with their votes, the winner first, and how many texts have none."""
        voters = [h for h in hypotheses if h.finish_reason != "cancelled"] or hypotheses
        given = [(self.answer(text_of(request, hypothesis)), hypothesis.score) for hypothesis in voters]
        counts = Counter(answer for answer, _ in given)
        return {
            "answers": [
                {"answer": answer, "votes": counts[answer], "share": share}
                for answer, share in dict(given).items()
                if answer is not None
            ],
            "without_answer": counts[None],
        }

    def answer(self, text: str) -> str | None:
        """Read the answer out of a text; None: there is none.

        Raises:
            ValueError: the pattern takes longer than `PATIENCE` seconds.
        """
        pattern = self.params.pattern
        try:
            last = deque(regex.finditer(pattern or NUMBER, text, timeout=PATIENCE), maxlen=1)
        except TimeoutError:
            raise ValueError(f"the pattern {pattern!r} takes more than {PATIENCE:g} s on a text: simplify it") from None
        if not last:
            return None
        found = last[0][1 if pattern and last[0].re.groups else 0] or ""
        return (normal(found) if self.params.normalize else found.strip()) or None


def normal(answer: str) -> str:
    """Write answers that mean the same alike: case, spaces, a final full stop, and how a number is written."""
    plain = " ".join(answer.split()).casefold().rstrip(".")
    number = regex.fullmatch(NUMBER, plain)
    if number is None:
        return plain
    whole = number["whole"].replace(",", "").lstrip("0") or "0"
    fraction = (number["fraction"] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if number["sign"] and value != "0" else value
