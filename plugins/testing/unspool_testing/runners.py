"""Runners around a runner: one that counts, one that misbehaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from unspool.runner import Batch, ModelRunner, Output


class CountingRunner:
    """Passes everything on, and keeps the batches.

    Args:
        runner: the one that works.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.batches: list[Batch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Batch) -> Output:
        """Keep the batch and run it."""
        self.batches.append(batch)
        return self._runner.forward(batch)


class MisbehavingRunner(CountingRunner):
    """Gives NaN or nothing but -inf after some tokens, raises in some passes, or takes its time.

    Args:
        runner: the one that works.
        nan_after: tokens after which every logit is NaN.
        dead_after: tokens after which every logit is -inf.
        raises: says of a pass, by its number from 0, whether it raises.
        delay: seconds that each pass takes longer.
    """

    def __init__(
        self,
        runner: ModelRunner,
        nan_after: Collection[int] = (),
        raises: Callable[[int], bool] = lambda _: False,
        *,
        dead_after: Collection[int] = (),
        delay: float = 0.0,
    ) -> None:
        super().__init__(runner)
        self._spoils = ((torch.nan, nan_after), (-torch.inf, dead_after))
        self._raises, self._delay = raises, delay

    def forward(self, batch: Batch) -> Output:
        """Run the batch and spoil it."""
        time.sleep(self._delay)
        if self._raises(len(self.batches)):
            self.batches.append(batch)
            raise RuntimeError("the model broke down, as it was asked to")
        output = super().forward(batch)
        tokens, logits = batch.token_ids[batch.wanted].tolist(), output.logits
        for value, after in self._spoils:
            spoilt = torch.tensor([token in after for token in tokens], dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(spoilt.unsqueeze(-1), value)
        return replace(output, logits=logits)
