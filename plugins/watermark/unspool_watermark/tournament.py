"""Tournament: a watermark that changes no probability, seen over all keys (SynthID-Text).

Candidates drawn from the model meet in pairs, layer by layer, and in each layer the one whose secret bit is 1 goes on;
between equals a coin decides. The winner is written. Nothing is drawn here: the distribution of the winner is known in
closed form, and takes the place of the model's. Whoever has the key finds more ones than chance gives. As a bit is as
often 1 as 0 over keys, the mean of that distribution over all keys is the model's own.

    for l = 1 ... m:   p[t] <- p[t] (1 + g_l[t] - sum_s p[s] g_l[s])               (Dathathri et al. 2024, N = 2)
    g_l[t] = bit l of H(key, last h tokens, t);      a context that was used before on the path is left unmarked
    score = mean over T tokens and m layers of w_l g_l,  w from 10 down to 1, scaled to a mean of 1
    z = (score - 1/2) * 2 sqrt(T) m / sqrt(sum w_l^2)

Costs no forward pass: a 64-bit hash over the tokens that are not forbidden, whose bits are the layers' g, and for each
layer some eight operations over them in float64. The paper's Bayesian detector, which is trained, is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_watermark.context import had_before, last_tokens
from unspool_watermark.detection import Detection, Detector, normal_tail
from unspool_watermark.key import Key, secret
from unspool_watermark.keyed_hash import draws

if TYPE_CHECKING:
    from unspool.step import Step

LEAST = 2.0**-20
"""Nobody's probability falls by more than this in a layer, so that what is allowed stays allowed. Losers that hold less
than this together would be scaled by less: what they are given too much is below 2**-40 of all."""
_UNITS = 2.0**52
"""Probabilities are added up in whole numbers of this part of 1, for such sums do not depend on their order."""


class Tournament(Plugin):
    """Replace the distribution by that of a tournament's winner."""

    row_local = True

    class Params(Parameters):
        """The key and the size of the tournament."""

        main: ClassVar[str | None] = "key"
        key: Key = Field(description="A secret number or text, or `{file: PATH}`; the detector needs the same.")
        depth: int = Field(30, ge=1, le=64, description="Layers of the tournament.")
        context_width: int = Field(4, ge=1, le=64, description="How many tokens before a token decide on its bits.")
        skip_repeats: bool = Field(True, description="Leave a context unmarked that was used before in the text.")

    def __init__(self, params: BaseModel) -> None:
        super().__init__(params)
        self._secret = secret(self.params.key, "tournament")

    def detector(self) -> TournamentDetector:
        """Give the detector of this watermark."""
        return TournamentDetector(self.params)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Play each row's tournament. A path that is too short for a context is left as it is."""
        context, marked = last_tokens(step, self.params.context_width)
        if self.params.skip_repeats:
            marked &= ~had_before(step, context)
        p = logits.double().softmax(dim=-1).nan_to_num(1.0)  # nan: all is forbidden already, and stays so
        tokens = _contenders(logits)
        gain = play(p.gather(-1, tokens), draws(self._secret, context, tokens), self.params.depth)
        logits.scatter_add_(-1, tokens, gain.masked_fill(~marked.unsqueeze(-1), 0.0).to(logits))


def play(p: Tensor, drawn: Tensor, depth: int) -> Tensor:
    """Play tournaments between two to the power of `depth` candidates each.

    Args:
        p: `[rows, k]` float64, how probable the tokens are that may be drawn, in any order.
        drawn: `[rows, k]` int64, whose lowest `depth` bits are the layers' g, the first layer's lowest.
        depth: 1 to 64.

    Returns:
        `[rows, k]` float64: the logarithm of how much likelier a token is to win than to be drawn. It is finite.
    """
    mass, gain = p * _UNITS, torch.zeros_like(p)
    # Over a whole vocabulary it is new memory that takes the time, so these are used again in each layer.
    bits, g, spare = drawn.clone(), torch.empty_like(p), torch.empty_like(p)
    for _ in range(depth):
        g.copy_(bits & 1)
        bits >>= 1
        torch.round(mass, out=spare)
        total = spare.sum(dim=-1, keepdim=True)
        # A share of the total, or what rounding adds to it would grow by half in each layer.
        losers = (total - spare.mul_(g).sum(dim=-1, keepdim=True)) / total
        # 1 + g - sum p g is 1 + losers where g is 1, else losers. (`lerp` chooses between them: it is exact at both
        # ends, and several times as fast as `where`.)
        lost, won = losers.clamp(min=LEAST), 1 + losers
        mass *= torch.lerp(lost, won, g, out=spare)
        gain += torch.lerp(lost.log(), won.log(), g, out=spare)
    return gain


def _contenders(logits: Tensor) -> Tensor:
    """List all tokens of each row that are not forbidden, and maybe others: `[rows, k]`, k as small as is quick."""
    rows, vocab = logits.shape
    most = int((logits > -torch.inf).sum(dim=-1).amax())
    if most > vocab // 8:
        return torch.arange(vocab, device=logits.device).expand(rows, -1)
    return logits.topk(most, dim=-1).indices  # ties decide nothing: all that is allowed is among them


class TournamentDetector(Detector):
    """Scores the bits of a text's tokens, each draw once.

    Args:
        params: those that the text was written with.
        weighted: the first layers count more, for they leave the later ones less to choose from; otherwise all layers
            count the same.

    Raises:
        ConfigError: the file of the key cannot be read.
    """

    def __init__(self, params: Tournament.Params, *, weighted: bool = True) -> None:
        super().__init__(params.context_width)
        self._secret, self._skips = secret(params.key, "tournament"), params.skip_repeats
        weights = torch.linspace(10, 1 if weighted else 10, params.depth, dtype=torch.float64)
        self.weights = weights / weights.mean()
        """What each layer counts: `[depth]` float64 of mean 1."""

    def _judge(self, contexts: Tensor, tokens: Tensor) -> Detection:
        # Of a context that comes again only the first token was marked; without skipping, of equal n-grams each one
        # was, by the same bits.
        marks = contexts if self._skips else torch.cat([contexts, tokens.unsqueeze(-1)], dim=-1)
        first: dict[tuple[int, ...], int] = {}
        for place, mark in enumerate(marks.tolist()):
            first.setdefault(tuple(mark), place)
        count, depth = len(first), len(self.weights)
        if not count:
            return Detection(0, 0.5, 0.5, 0.0, 1.0)
        kept = torch.tensor(list(first.values()))
        drawn = draws(self._secret, contexts[kept], tokens[kept].unsqueeze(-1))
        g = (drawn >> torch.arange(depth)) & 1  # [count, depth]
        score = float((g * self.weights).mean())
        z = (score - 0.5) * 2 * math.sqrt(count) * depth / float(self.weights.square().sum().sqrt())
        return Detection(count, score, 0.5, z, normal_tail(z))
