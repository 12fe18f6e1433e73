"""What watermarks claim to do, written a second time: slowly, for one text, in Python's whole numbers.

A green list raises the logits of green tokens; a tournament replaces the distribution by its winner's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

_ALL = 2**64


def _secret(key: Any, watermark: str) -> int:
    digest = hashlib.blake2b(str(key).encode(), digest_size=8, person=watermark.encode()).digest()
    return int.from_bytes(digest, "little")


def _fold(state: int, token: int) -> int:
    """Give output number `token` of the generator SplitMix64 that `state` seeds."""
    z = (state + (token + 1) * 0x9E3779B97F4A7C15) % _ALL
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _ALL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _ALL
    return z ^ (z >> 31)


def _chain(state: int, tokens: Sequence[int]) -> int:
    for token in tokens:
        state = _fold(state, token)
    return state


class GreenList:
    """A secret share of the vocabulary gains."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Ask of each token whether it is green after these tokens."""
        secret, logits = _secret(params.key, "green_list"), list(row.logits)
        before = params.context_width - (params.scheme == "self_hash")
        if len(row.path) < before:
            return logits
        context = row.path[len(row.path) - before :]
        for token in range(len(logits)):
            if params.scheme == "left_hash":
                drawn = _chain(secret, [*context, token])
            else:
                pairs = [_chain(secret, [anchor, token]) for anchor in [*context, token]]
                drawn = _fold(min(pairs, key=_as_signed), token)
            if drawn / _ALL < params.gamma:
                logits[token] += params.delta
        return logits


def _as_signed(value: int) -> int:
    return value - _ALL if value >= _ALL // 2 else value


class Tournament:
    """The winner of a tournament under a secret."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Play it layer by layer, unless the context is too short or was used before."""
        width, logits = params.context_width, list(row.logits)
        contexts = [
            tuple(row.path[end - width : end]) for end in range(len(row.prompt), len(row.path) + 1) if end >= width
        ]
        here = tuple(row.path[-width:])
        if len(row.path) < width or (params.skip_repeats and here in contexts[:-1]):
            return logits
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        p = [weight / math.fsum(weights) for weight in weights]
        seed = _chain(_secret(params.key, "tournament"), here)
        for layer in range(params.depth):
            g = [_fold(seed, token) >> layer & 1 for token in range(len(logits))]
            losers = math.fsum(p[token] for token in range(len(p)) if not g[token]) / math.fsum(p)
            factors = [1 + losers if won else max(losers, 2**-20) for won in g]
            p = [probability * factor for probability, factor in zip(p, factors, strict=True)]
            logits = [logit + math.log(factor) for logit, factor in zip(logits, factors, strict=True)]
        return logits
