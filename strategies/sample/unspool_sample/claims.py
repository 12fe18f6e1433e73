"""What sampling and its transforms claim to do, written a second time: slowly, for one row, without tensors.

Each claim is its paper's definition over plain lists. The test kit holds the plugins to them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any


def _probabilities(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def _surprise(probability: float) -> float:
    return -math.log(probability) if probability > 0 else math.inf


def _entropy(probabilities: Sequence[float]) -> float:
    return math.fsum(p * _surprise(p) for p in probabilities if p > 0)


def _ranked(logits: Sequence[float]) -> list[int]:
    """List tokens, likeliest first; of equal ones the lowest id first."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def _only(kept: Collection[int], logits: Sequence[float]) -> list[float]:
    return [logit if token in kept else -math.inf for token, logit in enumerate(logits)]


class Sample:
    """The distribution itself."""

    @staticmethod
    def distribution(params: Any, row: Any) -> list[float]:
        """Choose each token with its probability."""
        return _probabilities(row.logits)


class Temperature:
    """Logits divided by T."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Divide."""
        return [logit / params.temperature for logit in row.logits]


class TopK:
    """The k likeliest."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Keep the first k in order."""
        return _only(_ranked(row.logits)[: params.k], row.logits)


class TopP:
    """The smallest head that holds mass p."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Keep a token while those before it hold less than p."""
        if params.p == 1:
            return list(row.logits)
        probabilities, order = _probabilities(row.logits), _ranked(row.logits)
        kept = {
            token
            for place, token in enumerate(order)
            if place == 0 or math.fsum(probabilities[before] for before in order[:place]) < params.p
        }
        return _only(kept, row.logits)


class MinP:
    """What is at least a fraction p as probable as the best."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Compare each probability with the largest."""
        probabilities = _probabilities(row.logits)
        least = params.p * max(probabilities)
        return _only([token for token, p in enumerate(probabilities) if p >= least], row.logits)


class Typical:
    """The least odd tokens up to mass p."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Take tokens by |surprise - entropy| until they hold p; whatever is as odd as the last one stays too."""
        probabilities = _probabilities(row.logits)
        entropy = _entropy(probabilities)
        oddity = [abs(_surprise(p) - entropy) for p in probabilities]
        order = sorted(range(len(oddity)), key=lambda token: (oddity[token], token))
        taken: list[int] = []
        for token in order:
            taken.append(token)
            if math.fsum(probabilities[t] for t in taken) >= params.p:
                break
        return _only([token for token in order if oddity[token] <= oddity[taken[-1]]], row.logits)


class Epsilon:
    """What has at least probability epsilon."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Compare with epsilon; the most probable stay anyway."""
        probabilities, best = _probabilities(row.logits), max(row.logits)
        kept = [t for t, p in enumerate(probabilities) if p >= params.epsilon or row.logits[t] == best]
        return _only(kept, row.logits)


class Eta:
    """What has at least a probability that falls with the entropy."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Compare with min(epsilon, sqrt(epsilon) exp(-H)); the most probable stay anyway."""
        probabilities, best = _probabilities(row.logits), max(row.logits)
        least = min(params.epsilon, math.sqrt(params.epsilon) * math.exp(-_entropy(probabilities)))
        kept = [t for t, p in enumerate(probabilities) if p >= least or row.logits[t] == best]
        return _only(kept, row.logits)


class TopNSigma:
    """What lies within n standard deviations of the largest logit."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Measure the deviation over what is not forbidden."""
        allowed = [logit for logit in row.logits if logit > -math.inf]
        mean = math.fsum(allowed) / len(allowed)
        sigma = math.sqrt(math.fsum((logit - mean) ** 2 for logit in allowed) / len(allowed))
        least = max(allowed) - params.n * sigma
        return _only([token for token, logit in enumerate(row.logits) if logit >= least], row.logits)


class TopH:
    """The longest head whose entropy is bounded."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Try every head, and keep the longest that is within the bound."""
        order = _ranked(row.logits)
        if params.rule == "transformers":
            order = order[:100]
        probabilities = dict(zip(order, _probabilities([row.logits[token] for token in order]), strict=True))
        bound = params.alpha * _entropy(list(probabilities.values()))
        longest = 1
        for size in range(2, len(order) + 1):
            head = [probabilities[token] for token in order[:size]]
            entropy = _entropy([p / math.fsum(head) for p in head]) if params.rule == "paper" else _entropy(head)
            if entropy <= bound or (params.rule == "paper" and params.alpha == 1):
                longest = size
        return _only(order[:longest], row.logits)


class Xtc:
    """Now and then, not the top choices."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Where the coin says so, forbid all viable tokens but the least probable of them."""
        probabilities = _probabilities(row.logits)
        viable = [token for token, p in enumerate(probabilities) if p >= params.threshold]
        if row.uniform("xtc") >= params.probability or len(viable) < 2:
            return list(row.logits)
        survivor = min(viable, key=lambda token: (probabilities[token], token))
        return [-math.inf if t in viable and t != survivor else logit for t, logit in enumerate(row.logits)]


class Mirostat:
    """What surprises no more than a bound that follows the text."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Fold the bound over the text; the most probable tokens stay anyway."""
        bound = 2 * params.tau
        for logprob in row.logprobs:
            bound -= params.eta * (-logprob / math.log(2) - params.tau)
        probabilities, best = _probabilities(row.logits), max(row.logits)
        kept = [t for t, p in enumerate(probabilities) if _surprise(p) / math.log(2) <= bound or row.logits[t] == best]
        return _only(kept, row.logits)
