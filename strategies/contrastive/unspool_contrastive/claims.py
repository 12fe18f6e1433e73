"""What decoding by contrast claims to do, written a second time: slowly, for one row, without tensors.

Each claim is its paper's definition over plain lists. The test kit holds the plugins to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Text = tuple[int, ...]

NEARLY = 1e-9
"""Scores nearer than this may come in either order: the same terms in another order add up to other last bits."""


def _logprobs(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    norm = largest + math.log(math.fsum(math.exp(logit - largest) for logit in logits))
    return [logit - norm for logit in logits]


def _contrasted(
    logits: Sequence[float], against: Sequence[float], alpha: float, gain: float = 1.0, weight: float = 1.0
) -> list[float]:
    """Contrast log-probabilities among the tokens that have a fraction alpha of the largest probability."""
    least = math.log(alpha) + max(logits)
    return [
        gain * logprob - weight * other if logit >= least else -math.inf
        for logit, logprob, other in zip(logits, _logprobs(logits), against, strict=True)
    ]


class ContrastiveSearch:
    """Greedy search for what is likely and unlike all that stands before it."""

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[Text, None]] | None:
        """Search by hand. Where the best two candidates are nearly equal, either text is right."""
        limits = request.limits
        text: Text = ()
        while len(text) < limits.max_new_tokens and not set(text[-1:]) & set(request.end_ids):
            path = (*request.prompt_ids, *text)
            logits = model.logits_after(path).tolist()
            if len(text) < limits.min_new_tokens:
                logits = [-math.inf if token in request.end_ids else logit for token, logit in enumerate(logits)]
            if max(logits) == -math.inf:
                return []
            probability = [math.exp(logprob) for logprob in _logprobs(logits)]
            ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
            candidates = [token for token in ranked[: params.top_k] if probability[token] > 0]
            before = [model.hidden_after(path[: end + 1], -1).tolist() for end in range(len(path))]
            scores = {}
            for token in candidates if params.alpha > 0 else candidates[:1]:
                hidden = model.hidden_after((*path, token), -1).tolist()
                likeness = max(_cosine(hidden, other) for other in before)
                scores[token] = (1 - params.alpha) * probability[token] - params.alpha * likeness
            best = max(scores, key=lambda token: scores[token])
            if any(abs(score - scores[best]) < NEARLY for token, score in scores.items() if token != best):
                return None
            text = (*text, best)
        return [(text, None)]

    @staticmethod
    def passes(params: Any, request: Any, result: Any) -> int:
        """Run the candidates of every token, the last one's too."""
        tokens = len(result.hypotheses[0].token_ids)
        return tokens if params.top_k == 1 or params.alpha == 0 else tokens + 1


class ContrastiveDecoding:
    """What an expert says beyond an amateur. The claim knows the amateur that is the target's own first layers."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Subtract."""
        amateur = row.model.logits_after(row.path, layers=params.layers).tolist()
        against = _logprobs([logit / params.temperature for logit in amateur])
        gain = 1 + params.beta if params.form == "obrien" else 1.0
        return _contrasted(row.logits, against, params.alpha, gain, params.beta)


class Dola:
    """What the last layer says beyond the one that lies farthest from it."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Measure each layer, and subtract the farthest."""
        final = _logprobs(row.model.logits_after(row.path).tolist())
        layers = [_logprobs(row.model.logits_after(row.path, layers=layer).tolist()) for layer in params.layers]
        return _contrasted(row.logits, max(layers, key=lambda layer: _divergence(final, layer)), params.alpha)


class Guidance:
    """What the model says after the prompt, away from what it says after another one."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Push away."""
        negative = row.prompt[-1:] if params.negative_prompt is None else params.negative_prompt
        said = _logprobs(row.model.logits_after(row.path).tolist())
        other = _logprobs(row.model.logits_after((*negative, *row.tokens)).tolist())
        return [
            logit + (params.scale - 1) * (one - two) for logit, one, two in zip(row.logits, said, other, strict=True)
        ]


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    sizes = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / sizes if sizes else 0.0


def _divergence(one: Sequence[float], other: Sequence[float]) -> float:
    """Give the Jensen-Shannon divergence of two distributions, from their log-probabilities."""
    total = 0.0
    for a, b in zip(map(math.exp, one), map(math.exp, other), strict=True):
        mean = (a + b) / 2
        total += (a * math.log(a / mean) + b * math.log(b / mean)) / 2
    return total
