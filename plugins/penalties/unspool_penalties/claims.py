"""What penalties, biases and bans claim to do, written a second time: slowly, for one text, without tensors.

A transform says what becomes of the logits of one row. `allows` says which texts a constraint lets through. (Forced
tokens claim no texts: a force yields to what others forbid, so no text is against it by itself.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any


def _without(forbidden: Collection[int], logits: Sequence[float]) -> list[float]:
    return [-math.inf if token in forbidden else logit for token, logit in enumerate(logits)]


def _said(params: Any, row: Any) -> list[int]:
    return list(row.path) if params.include_prompt else list(row.tokens)


class RepetitionPenalty:
    """What was said is scaled down."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Divide a positive logit and multiply a negative one."""
        logits = list(row.logits)
        for token in set(_said(params, row)):
            logits[token] = logits[token] / params.penalty if logits[token] >= 0 else logits[token] * params.penalty
        return logits


class PresencePenalty:
    """What was said pays once."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Subtract once a token."""
        said = _said(params, row)
        return [logit - params.penalty if token in said else logit for token, logit in enumerate(row.logits)]


class FrequencyPenalty:
    """What was said pays each time."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Subtract once an occurrence."""
        said = _said(params, row)
        return [logit - params.penalty * said.count(token) for token, logit in enumerate(row.logits)]


class NoRepeatNgram:
    """No n-gram ends in the new text that stood on the path before."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid each token that would complete an n-gram for the second time."""
        vocabulary = range(len(row.logits))
        return _without([t for t in vocabulary if _repeats(params.n, [*row.path, t])], row.logits)

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look at the n-gram that ends at each new token."""
        path, prompt = [*request.prompt_ids, *tokens], len(request.prompt_ids)
        return not any(_repeats(params.n, path[: end + 1]) for end in range(prompt, len(path)))


def _repeats(n: int, path: Sequence[int]) -> bool:
    """Tell whether the last n-gram of a path stood on it before."""
    grams = [tuple(path[start : start + n]) for start in range(len(path) - n + 1)]
    return bool(grams) and grams[-1] in grams[:-1]


class Dry:
    """What would extend a repetition pays, the more the longer it is."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Find each token's longest match by trying all lengths."""
        logits = list(row.logits)
        for token in range(len(logits)):
            length = _longest_match(row.path, token, params.breakers)
            if length >= params.allowed_length:
                logits[token] -= params.multiplier * params.base ** (length - params.allowed_length)
        return logits


def _longest_match(path: Sequence[int], token: int, breakers: Collection[int]) -> int:
    longest = 0
    if token in breakers:
        return longest
    for length in range(1, min(50, len(path)) + 1):
        ending = [*path[-length:], token]
        if any(t in breakers for t in ending):
            break
        if any(list(path[at : at + length + 1]) == ending for at in range(len(path) - length)):
            longest = length
    return longest


class LogitBias:
    """Constants on chosen tokens."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Add them."""
        return [logit + params.biases.get(token, 0.0) for token, logit in enumerate(row.logits)]


class SequenceBias:
    """Constants on tokens that would complete a sequence."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Add the bias of every sequence with which the path would end; of equal sequences the last one counts."""
        logits = list(row.logits)
        biases = {tuple(sequence): bias for sequence, bias in params.sequences}
        for token in range(len(logits)):
            logits[token] += sum(bias for sequence, bias in biases.items() if _ends(sequence, [*row.path, token]))
        return logits


def _ends(sequence: Sequence[int], path: Sequence[int]) -> bool:
    return len(path) >= len(sequence) and list(path[len(path) - len(sequence) :]) == list(sequence)


class BadWords:
    """No sequence ends in the new text."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid what would complete a sequence."""
        ends = [s[-1] for s in params.sequences if _ends(s, [*row.path, s[-1]])]
        return _without(ends, row.logits)

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look at what ends at each new token."""
        path, prompt = [*request.prompt_ids, *tokens], len(request.prompt_ids)
        return not any(_ends(s, path[: end + 1]) for s in params.sequences for end in range(prompt, len(path)))


class SuppressTokens:
    """Some tokens never occur."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid them."""
        return _without(params.token_ids, row.logits)

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look for them."""
        return not set(params.token_ids) & set(tokens)


class BeginSuppressTokens:
    """Some tokens do not occur at one place."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid them there."""
        return _without(params.token_ids, row.logits) if len(row.tokens) == params.position else list(row.logits)

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look at that place."""
        return not any(token in params.token_ids for token in tokens[params.position : params.position + 1])


class ForcedBos:
    """The first token is one of a few, if any of them can be."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid all others there."""
        return _forced(params.token_ids, row.logits) if not row.tokens else list(row.logits)


class ForcedEos:
    """The token at the limit is one of a few, if any of them can be."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Forbid all others there."""
        last = len(row.tokens) == row.max_new_tokens - 1
        return _forced(params.token_ids, row.logits) if last else list(row.logits)


def _forced(token_ids: Collection[int], logits: Sequence[float]) -> list[float]:
    if all(logits[token] == -math.inf for token in token_ids):
        return list(logits)
    return _without([token for token in range(len(logits)) if token not in token_ids], logits)


class ExponentialDecayLengthPenalty:
    """End tokens gain with every token beyond the start."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Raise each by its own size times the growth, which stops at a billion."""
        logits = list(row.logits)
        over = len(row.tokens) - params.start
        for end in row.end_ids if over > 0 else ():
            if end < len(logits) and logits[end] > -math.inf:
                logits[end] += abs(logits[end]) * (min(params.factor**over, 1e9) - 1)
        return logits
