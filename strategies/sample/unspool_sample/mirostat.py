"""Mirostat, version 2: hold the surprise of the text at a target.

Tokens more surprising than a bound mu are forbidden. After each token the bound is corrected by how far the token's own
surprise, in the distribution that it was drawn from, lay from the target tau. The bound is state along the path, so
forks, drafts and preemption need no care.

    mu_0 = 2 tau;   keep t  iff  -log2 p[t] <= mu  or  p[t] = max p
    mu  <-  mu - eta * (-log2 q[token] - tau),   q what `select` saw               (Basu et al. 2021)

Version 2 is the authors' own simplification: it cuts by surprise itself where the paper's first algorithm estimates a
Zipf exponent to find k. Put it last among transforms, as nothing should cut after it. Costs a log-softmax and a
comparison over the vocabulary; as its state needs the model's own logprob, rounds are not looked ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.request import PreparedRequest
    from unspool.step import Step


@dataclass(frozen=True)
class Control:
    """The state along a path: the bound mu in bits, and the request's own tau and eta."""

    mu: float
    tau: float
    eta: float


class Mirostat(Plugin):
    """Forbid tokens above a bound on surprise that follows the text."""

    row_local = True
    reads_logprob = True

    class Params(Parameters):
        """The target and how fast it is sought."""

        main: ClassVar[str | None] = "tau"
        tau: float = per_request(5.0, gt=0, le=100, description="The target surprise, in bits a token.")
        eta: float = per_request(0.1, gt=0, le=1, description="The learning rate of the bound.")

    def initial(self, request: PreparedRequest) -> Control:
        """Begin with a bound of twice the target."""
        params = request.parameters[self.name]
        assert isinstance(params, Mirostat.Params)
        return Control(mu=2 * params.tau, tau=params.tau, eta=params.eta)

    def advance(self, state: Control, token: int, logprob: float = 0.0) -> Control:
        """Correct the bound by the token's surprise."""
        error = -logprob / math.log(2) - state.tau
        return replace(state, mu=state.mu - state.eta * error)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what is more surprising than each row's bound."""
        mu = logits.new_tensor([state.mu for state in step.states(self)]).unsqueeze(-1)
        surprise = logits.log_softmax(dim=-1) / -math.log(2)
        logits.masked_fill_((surprise > mu) & (logits < logits.amax(dim=-1, keepdim=True)), -torch.inf)
