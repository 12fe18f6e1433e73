"""Runners around a runner: one that counts, one that misbehaves."""

from __future__ import annotations

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
    """Gives NaN after some tokens, or raises in some passes.

    Args:
        runner: the one that works.
        nan_after: tokens after which every logit is NaN.
        raises: says of a pass, by its number from 0, whether it raises.
    """

    def __init__(
        self, runner: ModelRunner, nan_after: Collection[int] = (), raises: Callable[[int], bool] = lambda _: False
    ) -> None:
        super().__init__(runner)
        self._nan_after, self._raises = nan_after, raises

    def forward(self, batch: Batch) -> Output:
        """Run the batch and spoil it."""
        if self._raises(len(self.batches)):
            self.batches.append(batch)
            raise RuntimeError("the model broke down, as it was asked to")
        output = super().forward(batch)
        spoilt = [token in self._nan_after for token in batch.token_ids[batch.wanted].tolist()]
        return replace(
            output, logits=output.logits.masked_fill(torch.tensor(spoilt, dtype=torch.bool).unsqueeze(-1), torch.nan)
        )
