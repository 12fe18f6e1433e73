"""Draws: independent samples of which a rank chooses.

Best-of-n, self-consistency and minimum Bayes risk draw alike and choose differently. Their samples are those of
`sample` with as many texts, token for token, for the same seed: sample i is drawn by the noise of stream i.

    token = argmax_t (logits[t] + G[t]),     G[t] standard Gumbel of (seed, stream, position, t)

Costs as many forward passes as the longest sample has tokens, and a row a sample in each. The prompt, and whatever
samples begin with alike, is run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step


class Draws(Plugin):
    """Draw a number of samples. What ranks them is a subclass."""

    row_local = True

    class Params(Parameters):
        """How many samples."""

        main: ClassVar[str | None] = "samples"
        samples: int = Field(16, ge=1, le=1024, description="Texts that are drawn, at least `n`.")

    def start(self, request: PreparedRequest) -> int:
        """Begin with a branch for each sample."""
        if request.n > self.params.samples:
            raise InputError("n", request.n, f"at most as many as samples are drawn, {self.params.samples}")
        samples: int = self.params.samples
        return samples

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Draw one token a row, with the row's own noise."""
        token = step.sample("sample", logits)
        return Growth(row=torch.arange(len(logits), device=logits.device), token=token)


def in_order(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Put samples in the order of their streams, which is no matter of which one ended first."""
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.stream)


def logprob(hypothesis: Hypothesis) -> float:
    """Give a sample's log-probability in the pipeline, which the core has summed."""
    assert hypothesis.score is not None, "the core scores where a strategy ranks"
    return hypothesis.score


def mean_logprob(hypothesis: Hypothesis) -> float:
    """Give it by token, the end token counted; a sample that was cancelled may have none."""
    return logprob(hypothesis) / max(1, len(hypothesis.token_ids))


def text_of(request: PreparedRequest, hypothesis: Hypothesis) -> str:
    """Give a sample's text; where the model has no tokenizer, its token ids, with spaces between, without the end."""
    if request.tokenizer is not None:
        return hypothesis.text
    ended = hypothesis.finish_reason == "eos"
    return " ".join(map(str, hypothesis.token_ids[:-1] if ended else hypothesis.token_ids))
