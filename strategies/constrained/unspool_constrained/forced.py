"""Text that the language forces, hung below each row as drafts: one pass runs all of it.

The drafts are the canonical tokens of the forced text, and say nothing of what is chosen: the language allows other
spellings, and the strategy judges each draft by the model, as it judges anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from unspool_constrained.engine import Position

if TYPE_CHECKING:
    from unspool.step import Step

NONE = -1
LIKELY = 0.9
"""How likely a model is to spell forced text canonically. The core learns what it comes to, and whether it pays."""


def hang_forced(step: Step, positions: Sequence[Position]) -> None:
    """Hang below each row what its position forces, as far as its budget goes."""
    size = step.vocab_size
    budget = step.budget.tolist()
    forced = [[t for t in position.forced(most) if t < size] for position, most in zip(positions, budget, strict=True)]
    nodes = step.node
    for tokens in zip_longest(*forced, fillvalue=NONE):  # one token of each row, then the next of each
        nodes = step.draft(nodes, tokens, confidence=[LIKELY] * len(tokens))
