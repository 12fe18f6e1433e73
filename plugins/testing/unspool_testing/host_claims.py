"""What the kit's own plugins claim: laws that need claims are tried on these too, and build their texts from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from unspool_testing.claims import Row


class Likeliest:
    """The first of the likeliest tokens."""

    @staticmethod
    def distribution(params: Any, row: Row) -> list[float]:
        """Give it the whole probability."""
        best = max(range(len(row.logits)), key=lambda token: (row.logits[token], -token))
        return [float(token == best) for token in range(len(row.logits))]


class Drawn:
    """The distribution itself."""

    @staticmethod
    def distribution(params: Any, row: Row) -> list[float]:
        """Choose each token with its probability."""
        weights = [math.exp(logit - max(row.logits)) for logit in row.logits]
        return [weight / math.fsum(weights) for weight in weights]


class NarrowSearch:
    """Sums of log-probabilities; wide enough, every text."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Sequence[int], finish_reason: str, logprobs: Sequence[float]) -> float:
        """Add them up."""
        return math.fsum(logprobs)

    @staticmethod
    def exhaustive(request: Any, vocab_size: int) -> dict[str, Any]:
        """Keep every text there can be."""
        return {"children": vocab_size, "width": vocab_size**request.limits.max_new_tokens, "enough": 0}


class Particles:
    """Sums of log-probabilities, whatever the weights are."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Sequence[int], finish_reason: str, logprobs: Sequence[float]) -> float:
        """Add them up."""
        return math.fsum(logprobs)


class Bias:
    """A constant on one token."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Add it."""
        return [logit + (params.bias if token == params.token else 0) for token, logit in enumerate(row.logits)]


class Tired:
    """A distribution that flattens with the sum of what was said."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Divide."""
        return [logit / (1 + 0.1 * sum(row.tokens)) for logit in row.logits]


class NoDoubles:
    """No token twice in a row, and complete after so many."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Forbid the last token."""
        return [-math.inf if token == row.path[-1] else logit for token, logit in enumerate(row.logits)]

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look for doubles, the last token of the prompt included."""
        path = [request.prompt_ids[-1], *tokens]
        return len(tokens) <= params.most and all(one != other for one, other in pairwise(path))

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """End complete texts."""
        return "grammar_end" if len(tokens) == params.most else None


class Guidance:
    """What the model says after the prompt, away from what it says after another one."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Push away."""
        said = row.model.logits_after(row.path).tolist()
        without = row.model.logits_after((*params.prompt, *row.tokens)).tolist()
        return [x + params.scale * (one - other) for x, one, other in zip(row.logits, said, without, strict=True)]


HOST_CLAIMS: Mapping[str, type] = {
    "kit_greedy": Likeliest,
    "kit_sample": Drawn,
    "kit_search": NarrowSearch,
    "kit_particles": Particles,
    "kit_bias": Bias,
    "kit_tired": Tired,
    "kit_grammar": NoDoubles,
    "kit_guidance": Guidance,
}
"""Claims by the names of the plugins."""
