"""What greedy decoding claims to do, written a second time without tensors. The test kit holds it to that."""

from __future__ import annotations

import math
from typing import Any


class Greedy:
    """The first of the largest logits."""

    @staticmethod
    def distribution(params: Any, row: Any) -> list[float]:
        """Give the whole probability to the first of the largest logits."""
        best = _first_largest(row.logits)
        return [1.0 if token == best else 0.0 for token in range(len(row.logits))]

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[tuple[int, ...], None]]:
        """Follow the largest logit to the end; every one of `n` hypotheses is that text."""
        tokens: list[int] = []
        while len(tokens) < request.limits.max_new_tokens and not (tokens and tokens[-1] in request.end_ids):
            logits = model.logits_after((*request.prompt_ids, *tokens)).tolist()
            if len(tokens) < request.limits.min_new_tokens:
                logits = [-math.inf if token in request.end_ids else logit for token, logit in enumerate(logits)]
            if max(logits) == -math.inf:
                return []
            tokens.append(_first_largest(logits))
        return [(tuple(tokens), None)] * request.n


def _first_largest(logits: Any) -> int:
    best = 0
    for token, logit in enumerate(logits):
        if logit > logits[best]:
            best = token
    return best
