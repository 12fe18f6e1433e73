"""The finished texts of a beam search, and when they are enough."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Literal

EarlyStopping = bool | Literal["never"]


@dataclass
class Pool:
    """The scores of the best finished texts of one request.

    Args:
        width: how many are kept.
    """

    width: int
    scores: list[float] = field(default_factory=list)
    """Best first."""

    def add(self, score: float) -> None:
        """Take in a finished text, and forget the worst beyond the width."""
        bisect.insort(self.scores, score, key=lambda kept: -kept)
        del self.scores[self.width :]

    def is_enough(self, best: float, early: EarlyStopping) -> bool:
        """Tell whether the search is over.

        Args:
            best: what the best text that goes on would score, now or, where `early` is "never", at its best length.
            early: True: a full pool is enough. Else it must also be out of reach.
        """
        full = len(self.scores) == self.width
        return full and (early is True or best <= self.scores[-1])
