"""Particles: sequential Monte Carlo, so that weighted texts stand for a distribution that nobody can draw from.

A mask or a temperature bends what is drawn away from what the model means, one token at a time: text that cannot end
well is noticed too late. So each particle carries the weight by which its draws must be corrected. Where few particles
hold all weight, all are drawn anew by weight: good beginnings are continued several times, poor ones are given up.

    draw      x_t ~ q(. | x_<t)                                q: the pipeline's distribution
    weigh     w  <-  w * p(x_t | x_<t) / q(x_t | x_<t) * exp(phi(x_<=t) - phi(x_<t))
                                                               p: the model's own (`target: model`), or q
    resample  if (sum w)^2 / sum w^2  <  resample_below * R,   over the R particles that have not ended:
              R ancestors ~ w,  w  <-  (sum w) / R
              (Gordon et al. 1993; Lew et al. 2023; how the ancestors are drawn: Douc & Cappe 2005)

Resampling keeps the sum of weights. So for any function f of a text, 1/N sum of w_i f(x_i) has the expectation
sum over x of p(x) exp(phi(x)) f(x), x over all texts that the pipeline can draw; with f = 1 it estimates the evidence.
A particle that ends keeps its weight. One that meets a dead end, or a potential of -inf, weighs 0, and its place is
filled again when the others are drawn anew.

Costs as many forward passes as the longest particle has tokens, with a row a particle; particles with the same
beginning share it. Resampling copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool import noise
from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.noise import draw
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_many.draws import in_order
from unspool_many.functions import find, named

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step

POTENTIALS = "unspool.potentials"
"""The group of entry points that name potentials: `(request, token_ids, ended) -> log weight`."""

CUT_OFF = frozenset({"length", "deadline"})
"""Finish reasons of texts that are not whole."""

Resampling = Literal["systematic", "stratified", "multinomial"]


@dataclass
class Population:
    """What a request knows of its particles.

    Args:
        running: the streams of those that have not ended; those that died are among them, as places to fill.
        resamplings: how often they were drawn anew.
    """

    running: set[int]
    resamplings: int = 0


class Particles(Plugin):
    """Grow weighted particles. A score is (log weight, potential so far, resamplings so far)."""

    score_columns = 3

    class Params(Parameters):
        """How many particles, what they stand for, and when they are drawn anew."""

        main: ClassVar[str | None] = "particles"
        particles: int = Field(16, ge=1, le=1024, description="How many, at least `n`.")
        target: Literal["model", "pipeline"] = Field(
            "model",
            description="What the weights correct to: `model`, what the model itself says, of what the plugins allow; "
            "`pipeline`, the distribution as the plugins make it.",
        )
        potential: Annotated[str, named(POTENTIALS)] | None = Field(
            None,
            description="What texts are weighed with besides: an entry point of `unspool.potentials`, or "
            "`module:attribute`.",
            examples=[None, "distinct"],
        )
        resample_below: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Draw anew below this effective sample size, as a fraction of the particles that have not "
            "ended; 0: never (importance sampling).",
        )
        resampling: Resampling = Field("systematic", description="How the ancestors are drawn.")

    def start(self, request: PreparedRequest) -> int:
        """Begin with all particles on the prompt."""
        particles: int = self.params.particles
        if request.n > particles:
            raise InputError("n", request.n, f"at most as many as there are particles, {particles}")
        return particles

    def open(self, request: PreparedRequest) -> Population:
        """Begin with all of them running."""
        return Population(set(range(self.params.particles)))

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Draw anew where weights are uneven; then let each particle draw a token, and weigh it."""
        row, stream, score = (part.to(logits.device) for part in self._ancestors(step))
        seed = torch.tensor([request.seed for request in step.requests], device=row.device)[step.request[row]]
        token = draw(logits[row], noise.key(seed, stream, step.length[row] + 1, noise.purpose_key("sample")))
        score = score.to(logits.dtype)
        if self.params.target == "model":
            score[:, 0] += _logprob(step.raw.to(logits.dtype), row, token) - _logprob(logits, row, token)
        return Growth(row=row, token=token, score=score, stream=stream)

    def _ancestors(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Say from which row each particle goes on: rows and streams `[particles]`, scores `[particles, 3]`.

        This is done on the host, request by request, in float64: all that it needs comes there in one copy.
        """
        ints = torch.stack([step.request, step.stream, step.length], 1)
        table = torch.cat([ints.double(), step.score.double()], 1).to("cpu")
        parts = []
        for number, (request, own) in enumerate(zip(step.requests, step.own(self), strict=True)):
            row = (table[:, 0] == number).nonzero().squeeze(1)
            stream, length, score = table[row, 1].long(), table[row, 2].long(), table[row, 3:]
            places = torch.tensor(sorted(own.running))
            if effective_size(score[:, 0]) < self.params.resample_below * len(places) - 1e-9:
                key = noise.key(torch.tensor(request.seed), places, length[0] + 1, noise.purpose_key("resample"))
                parent = ancestors(score[:, 0], noise.uniform(key), self.params.resampling)
                mean = score[:, 0].logsumexp(0) - math.log(len(places))
                row, stream, score = row[parent], places, score[parent]
                score[:, 0] = mean
                score[:, 2] += 1
            parts.append((row, stream, score))
        rows, streams, scores = zip(*parts, strict=True)
        return torch.cat(rows), torch.cat(streams), torch.cat(scores)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Weigh the children by the potential, and note who has ended."""
        score, streams = growth.score, growth.stream
        assert score is not None and streams is not None
        if self.params.potential is not None:
            potential = self._potentials(step, growth)
            score[:, 0] += potential - score[:, 1]
            score[:, 1] = potential
            growth.drop |= potential == -torch.inf
        populations = step.own(self)
        children = zip(growth.request.tolist(), streams.tolist(), score[:, 2].tolist(), strict=True)
        for child, (request, stream, resamplings) in enumerate(children):
            own = populations[request]
            own.resamplings = max(own.resamplings, int(resamplings))
            if growth.finish[child] is not None and not growth.drop[child]:
                own.running.discard(stream)

    def _potentials(self, step: Step, growth: Growth) -> Tensor:
        """Ask for the potential of each child's text: `[children]` float64."""
        ids, lengths = growth.paths()
        name, values = self.params.potential, []
        potential = find(POTENTIALS, name)
        for child, number in enumerate(growth.request.tolist()):
            request, reason = step.requests[number], growth.finish[child]
            tokens = tuple(ids[child, len(request.prompt_ids) : int(lengths[child])].tolist())
            value = float(potential(request, tokens, reason is not None and reason not in CUT_OFF))
            if math.isnan(value) or value == math.inf:
                raise ValueError(f"the potential {name!r} gave {value} for the new tokens {list(tokens)}")
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Order texts by their weights, of equal ones by stream: who ended first must not decide."""
        return super().rank(request, in_order(hypotheses))

    def report(self, request: PreparedRequest, own: Population, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell the estimate of the evidence, and how much each text counts, best first."""
        weights = torch.tensor([hypothesis.score for hypothesis in hypotheses], dtype=torch.float64)
        return {
            "log_evidence": float(weights.logsumexp(0)) - math.log(self.params.particles),
            "effective_sample_size": effective_size(weights),
            "weights": weights.softmax(0).tolist(),
            "resamplings": own.resamplings,
        }


def effective_size(weights: Tensor) -> float:
    """Say how many particles of equal weight log weights `[n]` are worth: (sum of w)^2 / sum of w^2."""
    return float((2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp())


def ancestors(weights: Tensor, uniform: Tensor, how: Resampling) -> Tensor:
    """Draw ancestors: each of n particles comes m * w / sum of w times, in the mean.

    Args:
        weights: `[n]` float64 log weights, not all -inf.
        uniform: `[m]` float64 in (0, 1); `systematic` needs the first alone.
        how: m points at equal distances; one in each of m equal pieces; or anywhere.

    Returns:
        `[m]` int64. A particle of weight 0 is never among them.
    """
    count = len(uniform)
    point = uniform
    if how != "multinomial":
        point = (torch.arange(count) + (uniform[0] if how == "systematic" else uniform)) / count
    mass = weights.softmax(0).cumsum(0)
    last = int((mass < mass[-1]).sum())  # a point may be rounded up to 1, beyond which there is nobody
    return torch.searchsorted(mass / mass[-1], point, right=True).clamp(max=last)


def _logprob(logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Give the log-probability of tokens after rows: `[particles]`; -inf where a token is forbidden."""
    chosen = logits[row, token]
    return (chosen - logits.logsumexp(dim=-1)[row]).masked_fill(chosen == -torch.inf, -torch.inf)
