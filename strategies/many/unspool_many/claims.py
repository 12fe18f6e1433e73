"""What these strategies claim, written a second time: slowly, without tensors.

Which texts come back depends on noise, of which claims know nothing, and a text's score, as a rule, on the other texts.
What can be said of one text alone is said here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Text = tuple[int, ...]


class BestOf:
    """What the scorer says."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Add up log-probabilities, or take their mean. Strangers' scorers are believed."""
        if params.scorer == "logprob":
            return math.fsum(logprobs)
        return math.fsum(logprobs) / len(tokens) if params.scorer == "mean_logprob" else None


class SelfConsistency:
    """A share of votes."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Know of a sample that votes alone that it has all votes, if it has an answer: a table's texts are numbers."""
        if params.samples > 1 or params.pattern is not None or request.tokenizer is not None:
            return None
        return float(_has_a_text(tokens, finish_reason))


class MinimumBayesRisk:
    """An expected utility."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Know of a sample that is alone that it is of all use to itself; chrF knows nothing of an empty text."""
        if params.samples > 1 or params.utility not in ("exact", "token_f1", "chrf") or request.tokenizer is not None:
            return None
        return float(_has_a_text(tokens, finish_reason) or params.utility != "chrf")


class Particles:
    """A log weight."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Know the weight where nothing is corrected: it is the potential, unless particles are drawn anew by that."""
        alone = len(request.pipeline.plugins) == 1  # nobody else bends the distribution or kills a particle
        if params.target == "model" and not (alone and request.limits.min_new_tokens == 0):
            return None
        if params.potential is None and alone:
            return 0.0
        drawn_anew = params.resample_below > 0 and params.particles > 1
        if drawn_anew or params.potential not in (None, "distinct"):
            return None
        return math.log(len(set(tokens)) / len(tokens)) if params.potential else 0.0


class ASAp:
    """How likely a text is, by what is allowed alone."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Add up log-probabilities: the order of texts is another matter."""
        return math.fsum(logprobs)


def _has_a_text(tokens: Text, finish_reason: str) -> bool:
    return len(tokens) > 1 or finish_reason != "eos"
