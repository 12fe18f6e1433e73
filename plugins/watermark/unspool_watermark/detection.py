"""Detection: how surprising a text is to somebody who holds the key and believes that it was written without it.

To a text that knows nothing of the key, what the key draws for its tokens is fair noise. So each draw is counted once:
words that are said again bring nothing new. What is left is a sum of independent draws, and its z-score says by how
many standard deviations it lies above what chance gives. The prompt is not judged; it may be given as context.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool.errors import InputError


@dataclass(frozen=True)
class Detection:
    """What a detector finds in a text.

    Args:
        scored: tokens that were counted.
        score: their mean.
        expected: what it would be by chance.
        z: standard deviations above that; 0 where nothing was counted.
        p_value: how probable so high a score is in a text that knows nothing of the key.
    """

    scored: int
    score: float
    expected: float
    z: float
    p_value: float


class Detector(ABC):
    """Looks for one watermark with one key.

    Args:
        width: how many tokens before a token decide what is drawn for it.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def detect(self, text: str | Sequence[int], *, tokenizer: Any = None, before: Sequence[int] = ()) -> Detection:
        """Judge a text.

        Args:
            text: token ids, or text.
            tokenizer: of the model that may have written it, of transformers; not needed for token ids.
            before: token ids that stand before it, such as its prompt. They are context and are not judged; without
                them the first `width` tokens cannot be judged either.

        Raises:
            InputError: text without a tokenizer.
        """
        token_ids = self._encoded(text, tokenizer) if isinstance(text, str) else list(text)
        tail = list(before)[max(0, len(before) - self.width) :]
        path = torch.tensor([*tail, *token_ids], dtype=torch.int64)
        count = max(0, len(path) - self.width)
        at = torch.arange(count).unsqueeze(-1) + torch.arange(self.width)
        return self._judge(path[at], path[self.width :])

    @abstractmethod
    def _judge(self, contexts: Tensor, tokens: Tensor) -> Detection:
        """Judge tokens `[n]` that stand after contexts `[n, width]`, in the order of the text."""

    @staticmethod
    def _encoded(text: str, tokenizer: Any) -> list[int]:
        if tokenizer is None:
            raise InputError("text", text, "token ids, or text together with the tokenizer of its model")
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return token_ids


def normal_tail(z: float) -> float:
    """Give the probability that a standard normal number is at least z."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def binomial_tail(hits: int, count: int, share: float) -> float:
    """Give the probability of at least `hits` of `count` independent events, each of probability `share`.

    It is the exact sum, since a normal law promises short texts fewer false alarms than there are.
    """
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(share)
        + (count - k) * math.log1p(-share)
        for k in range(hits, count + 1)
    ]
    largest = max(logs)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs))
