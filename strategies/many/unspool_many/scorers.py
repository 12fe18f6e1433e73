"""Scorers: what a sample is worth, by its probability in the pipeline.

A scorer is a function `(request, hypotheses) -> scores`, one number a hypothesis, larger is better. It is named by an
entry point in the group `unspool.scorers`. Hypotheses come in the order of their streams, with their texts, and with
the sum of their log-probabilities as `score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unspool_many import draws

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest


def logprob(request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[float]:  # noqa: ARG001
    """Score by the log-probability of the whole text, which favours short ones."""
    return [draws.logprob(hypothesis) for hypothesis in hypotheses]


def mean_logprob(request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[float]:  # noqa: ARG001
    """Score by the log-probability of a token on the average."""
    return [draws.mean_logprob(hypothesis) for hypothesis in hypotheses]
