"""Green list: favour a secret part of the vocabulary that changes with the context.

A hash of the last tokens under a key calls a share gamma of all tokens green, and delta is added to their logits. A
reader sees nothing odd; whoever has the key counts green tokens, and finds more than chance gives. The distribution is
changed: of two equally likely tokens the green one is exp(delta) times as likely.

    green t  iff  U(key, context, t) < gamma;      logits[t] <- logits[t] + delta  where t is green
    left_hash:  U is a hash of the last h tokens and t                                (Kirchenbauer et al. 2023)
    self_hash:  U is a hash of the least H(key, a, t) over t and the h - 1 tokens a before it     (the same, 2024)
    z = (green - gamma T) / sqrt(T gamma (1 - gamma))   over T different draws

Each token is green by itself with probability gamma, so the list has that share in expectation, and draws of different
contexts or tokens are independent, which is what z supposes. (Lists of exactly gamma of the vocabulary need a shuffle
a row, one row at a time, and bind the detector to a vocabulary's size.) Costs no forward pass: an integer hash over the
vocabulary, 2 h + 1 of them for `self_hash`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool_watermark.context import last_tokens
from unspool_watermark.detection import Detection, Detector, binomial_tail
from unspool_watermark.key import Key, secret
from unspool_watermark.keyed_hash import below, draws, fold

if TYPE_CHECKING:
    from unspool.step import Step


class GreenList(Plugin):
    """Add a constant to the logits of a secret share of the vocabulary."""

    row_local = True

    class Params(Parameters):
        """The key and the strength of the watermark."""

        main: ClassVar[str | None] = "key"
        key: Key = Field(description="A secret number or text, or `{file: PATH}`; the detector needs the same.")
        gamma: float = Field(0.25, gt=0, lt=1, description="The share of green tokens.")
        delta: float = per_request(2.0, ge=0, le=100, description="What is added to their logits.")
        scheme: Literal["left_hash", "self_hash"] = Field(
            "left_hash", description="What decides: the tokens before, or the token itself and one of those before."
        )
        context_width: int = Field(
            1, ge=1, le=64, description="How many tokens that is; `self_hash` counts the token itself as one."
        )

    def __init__(self, params: BaseModel) -> None:
        super().__init__(params)
        self._list = _Lists(self.params)

    def detector(self) -> GreenListDetector:
        """Give the detector of this watermark."""
        return GreenListDetector(self.params)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Favour the green tokens of each row. A path that is too short for a context is left as it is."""
        context, whole = last_tokens(step, self._list.width)
        vocabulary = torch.arange(logits.shape[-1], device=logits.device).unsqueeze(0)
        green = below(self._list.draws(context, vocabulary), self.params.gamma) & whole.unsqueeze(-1)
        logits.add_(green * step.values(self, "delta").to(logits).unsqueeze(-1))


class GreenListDetector(Detector):
    """Counts green tokens, each draw once.

    Args:
        params: those that the text was written with; `delta` does not matter.

    Raises:
        ConfigError: the file of the key cannot be read.
    """

    def __init__(self, params: GreenList.Params) -> None:
        self._lists, self._gamma = _Lists(params), params.gamma
        super().__init__(self._lists.width)

    def _judge(self, contexts: Tensor, tokens: Tensor) -> Detection:
        # Equal n-grams give equal draws; under `self_hash` others may too, where the same pair decides.
        different = {*self._lists.draws(contexts, tokens.unsqueeze(-1)).flatten().tolist()}
        if not different:
            return Detection(0, self._gamma, self._gamma, 0.0, 1.0)
        count, green = len(different), int(below(torch.tensor([*different]), self._gamma).sum())
        z = (green - self._gamma * count) / math.sqrt(count * self._gamma * (1 - self._gamma))
        return Detection(count, green / count, self._gamma, z, binomial_tail(green, count, self._gamma))


class _Lists:
    """All green lists of one key: what decides on a token after a context."""

    def __init__(self, params: GreenList.Params) -> None:
        self._secret = secret(params.key, "green_list")
        self._itself = params.scheme == "self_hash"
        self.width = params.context_width - self._itself
        """How many tokens before a token decide on it."""

    def draws(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Draw a number for each of the tokens `[n or 1, k]` after its context `[n, width]`: `[n, k]` int64."""
        if not self._itself:
            return draws(self._secret, context, tokens)
        least = fold(fold(self._secret, tokens), tokens).expand(len(context), -1)
        for anchor in context.unsqueeze(-1).unbind(dim=1):
            least = least.minimum(fold(fold(self._secret, anchor), tokens))
        return fold(least, tokens)
