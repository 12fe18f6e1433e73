"""Log-softmax: turn logits into log-probabilities.

A shift of all logits changes no distribution, but it changes what plugins do that look at the sign or the size of
logits, such as a repetition penalty. transformers' beam search runs its processors on log-probabilities; so does ours
with this plugin put first.

    logits  <-  logits - log of sum of exp(logits)

Costs one pass over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.plugin import Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.step import Step


class LogSoftmax(Plugin):
    """Subtract the log of the sum of exponentials."""

    row_local = True

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Normalise every row."""
        norm = logits.logsumexp(dim=-1, keepdim=True)
        logits.sub_(norm.masked_fill(norm == -torch.inf, 0.0))  # a dead row stays dead, and does not become NaN
