"""Greedy decoding: take the most probable token.

Every step grows each branch by the token with the largest logit, so there is no noise and no score. Of several equal
largest logits the lowest token id wins, on every device. With `n > 1` all hypotheses are the same text on the same
nodes.

    token = min { t : logits[t] = max logits }

Costs one forward pass a token, one row a branch, and one argmax over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Plugin, hookimpl
from unspool.rank import argmax

if TYPE_CHECKING:
    from unspool.step import Step


class Greedy(Plugin):
    """Grow each row by its most probable token."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Choose the first of the largest logits of each row."""
        return Growth(row=torch.arange(len(logits), device=logits.device), token=argmax(logits))
