"""ASAp: samples that learn where a constraint leads, until they come as the model alone would write them.

A mask says which tokens can go on, and not how likely it is that what follows can. So a text that starts well and can
hardly end well comes too often. Here samples are drawn one after another, and each beginning that was seen remembers
how much of the model's mass the constraint left below it. The next sample is drawn with that in mind.

    draw    t  ~  P(t | x) * future(x + t)
    learn   future(x)  =  sum of P(t | x) * future(x + t)  over all t allowed after x,    along each sample, backwards
            future     =  1 where nobody has been, and of whole texts;  0 of dead ends    (Park et al. 2024)

P is the model's own probability; if plugins do more than forbid, the pipeline's share of the mass that the model gives
to what is allowed after x. A future is never too small, and falls to what it is: the chance that the model, left alone,
keeps to the constraint from there on. So samples come at first as under plain masking, and in the end as the model
writes them, among allowed texts.

Costs as many forward passes as all samples have tokens, one after another, with a row in each (with `together`, fewer
passes of more rows). Of the samples the last `n` are returned: they know most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool import noise
from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.noise import draw
from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step


@dataclass(eq=False)
class Beginning:
    """What samples have learned of a text's beginning.

    Args:
        future: at most so much of the model's mass below it goes to texts that are allowed.
        mass: what the model gives to tokens that are allowed after it; known once it was a row.
        allowed: how many they are.
        below: token -> P of it, and the beginning that it makes; of those that were drawn.
    """

    future: float = 1.0
    mass: float = 1.0
    allowed: int | None = None
    below: dict[int, tuple[float, Beginning]] = field(default_factory=dict)

    def after(self, token: int, chance: float) -> Beginning:
        """Give the beginning with one token more, whose chance is P."""
        return self.below.setdefault(token, (chance, Beginning()))[1]

    def learn(self) -> None:
        """Add up the future from what is below."""
        seen = math.fsum(chance for chance, _ in self.below.values())
        unseen = max(0.0, self.mass - seen) if len(self.below) != self.allowed else 0.0
        self.future = unseen + math.fsum(chance * after.future for chance, after in self.below.values())


@dataclass(eq=False)
class Known:
    """What a request's samples have learned, and how far those are that are being drawn.

    Args:
        root: the empty beginning.
        begun: samples that have begun; their streams are 0, 1, ...
        drawn: stream -> the beginnings along it, the empty one first; of samples that have not ended.
        over: no sample begins any more.
    """

    root: Beginning = field(default_factory=Beginning)
    begun: int = 0
    drawn: dict[int, list[Beginning]] = field(default_factory=dict)
    over: bool = False

    def settle(self, stream: int, future: float) -> None:
        """Let a sample end, and learn from it."""
        *above, last = self.drawn.pop(stream)
        last.future = future
        for beginning in reversed(above):
            beginning.learn()


class ASAp(Plugin):
    """Draw samples in turn, each by what those before it have learned of the constraint."""

    holds = True

    class Params(Parameters):
        """How many samples."""

        main: ClassVar[str | None] = "samples"
        samples: int = Field(
            16,
            ge=1,
            le=1024,
            description="Texts that are drawn, at least `n`; the last come first.",
            examples=[1, 2, 5],
        )
        together: int = Field(
            1, ge=1, le=256, description="Texts that are drawn side by side. They do not learn from each other."
        )

    def start(self, request: PreparedRequest) -> int:
        """Begin with a branch that stays on the prompt, below which samples begin."""
        if request.n > self.params.samples:
            raise InputError("n", request.n, f"at most as many as samples are drawn, {self.params.samples}")
        return 1

    def widest(self, request: PreparedRequest) -> int:
        """Keep the samples that are drawn side by side."""
        together: int = self.params.together
        return together

    def open(self, request: PreparedRequest) -> Known:
        """Know nothing."""
        return Known()

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Draw a token for each sample, and let others begin where some have ended."""
        row, stream, places, stays = self._turns(step)
        seed = torch.tensor([request.seed for request in step.requests], device=logits.device)
        length = step.length.to(logits.device)[row]
        keys = noise.key(seed[step.request.to(logits.device)[row]], stream, length + 1, noise.purpose_key("sample"))
        seen = logits[row]
        weights = seen + _log_futures(places, seen)
        token = draw(weights, keys)
        possible = weights.amax(dim=-1) > -torch.inf
        allowed, chance, mass = _model_says(step.raw[row].double(), seen.double(), token)
        for place, path in enumerate(places):
            if possible[place]:
                here = path[-1]
                here.allowed, here.mass = int(allowed[place]), float(mass[place])
                path.append(here.after(int(token[place]), float(chance[place])))
        # A row below which something hangs stays. What hangs there is of no matter, so it is the same in each step.
        step.draft(step.node[stays], logits[stays].argmax(dim=-1))
        return Growth(row=row[possible], token=token[possible], stream=stream[possible])

    def _turns(self, step: Step) -> tuple[Tensor, Tensor, list[list[Beginning]], Tensor]:
        """Say who draws: rows, streams, the beginnings along which each sample came; and which rows stay."""
        rows_of: list[list[tuple[int, int, int]]] = [[] for _ in step.requests]
        table = zip(step.request.tolist(), step.stream.tolist(), step.length.tolist(), strict=True)
        for row, (request, stream, length) in enumerate(table):
            rows_of[request].append((row, stream, length))
        draws: list[tuple[int, int]] = []
        places: list[list[Beginning]] = []
        stays: list[int] = []
        for own, rows in zip(step.own(self), rows_of, strict=True):
            there = {stream for _, stream, length in rows if length}
            for stream in [stream for stream in own.drawn if stream < own.begun and stream not in there]:
                own.settle(stream, 0.0)  # nothing could follow it
            for row, stream, length in rows:
                if length:
                    del own.drawn[stream][length + 1 :]  # of a draw that came to nothing, as another plugin raised
                    draws.append((row, stream))
                elif not own.over and own.root.future > 0:
                    room = self.params.together - len(there)
                    last = min(own.begun + room, self.params.samples)
                    draws += [(row, fresh) for fresh in range(own.begun, last)]
                    own.drawn.update({fresh: [own.root] for fresh in range(own.begun, last)})
                    stays += [row] if last < self.params.samples else []
            places += [own.drawn[stream] for _, stream in draws[len(places) :]]
        device = step.raw.device
        drawing = torch.tensor(draws, dtype=torch.int64, device=device).reshape(-1, 2)
        return drawing[:, 0], drawing[:, 1], places, torch.tensor(stays, dtype=torch.int64, device=device)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Learn from samples that end. After a deadline none begins."""
        assert growth.stream is not None
        owns = step.own(self)
        table = zip(growth.request.tolist(), growth.stream.tolist(), growth.finish, growth.drop.tolist(), strict=True)
        for request, stream, reason, dropped in table:
            own = owns[request]
            own.begun = max(own.begun, stream + 1)
            if dropped or reason is not None:
                own.settle(stream, 0.0 if dropped else 1.0)
                own.over |= reason == "deadline"

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Put the samples that know most first: those that were drawn last."""
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.stream)

    def report(self, request: PreparedRequest, own: Known, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell what is known of how likely the model is to keep to what is allowed."""
        future = own.root.future
        return {
            "log_evidence_at_most": math.log(future) if future > 0 else None,
            "texts": len({hypothesis.token_ids for hypothesis in hypotheses}),
        }


def _log_futures(places: Sequence[Sequence[Beginning]], like: Tensor) -> Tensor:
    """Give the logarithm of the future of each token after each place: `[n, vocab]`."""
    known = [
        (row, token, math.log(after.future) if after.future > 0 else -math.inf)
        for row, path in enumerate(places)
        for token, (_, after) in path[-1].below.items()
    ]
    futures = torch.zeros_like(like)
    if known:
        row, token, value = zip(*known, strict=True)
        futures[list(row), list(token)] = torch.tensor(value).to(futures)
    return futures


def _model_says(raw: Tensor, logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give, of rows `[n, vocab]` float64, how many tokens are allowed, P of `token`, and the model's mass on what is
    allowed: `[n]` each.
    """
    allowed = logits > -torch.inf
    mass = (raw.masked_fill(~allowed, -torch.inf).logsumexp(dim=-1) - raw.logsumexp(dim=-1)).exp()
    chance = logits.softmax(dim=-1).gather(1, token.unsqueeze(1)).squeeze(1) * mass
    return allowed.sum(dim=-1), chance, mass
