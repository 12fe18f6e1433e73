"""Plugins without a fault, into which faults are planted where no installed plugin has a place for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.request import PreparedRequest
from unspool.step import Step
from unspool_testing.host_claims import NarrowSearch as ScoresOfSearch


class Said(Plugin):
    """Lower what was said before: a path state that holds all new tokens."""

    row_local = True

    def initial(self, request: PreparedRequest) -> Sequence[int]:
        return ()

    def advance(self, state: Sequence[int], token: int, logprob: float = 0.0) -> Sequence[int]:
        return (*state, token)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        for row, said in enumerate(step.states(self)):
            for token in said:
                logits[row, token] -= 0.7


class Dimmed(Plugin):
    """Flatten the distribution by a share that is given in percent."""

    row_local = True

    class Params(Parameters):
        percent: float = Field(50, gt=0, le=100)

        @field_validator("percent", mode="after")
        @classmethod
        def _as_given(cls, value: float) -> float:
            return value

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits.mul_(self.params.percent / 100)


class Twice(Plugin):
    """End a text, with a word of its own, at the second `token` in it."""

    row_local = True

    class Params(Parameters):
        token: int = Field(1, ge=0, le=2)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        ids, lengths = growth.paths()
        for child, request in enumerate(growth.request.tolist()):
            new = ids[child, len(step.requests[request].prompt_ids) : int(lengths[child])]
            if int((new == self.params.token).sum()) == 2:
                growth.finish[child] = "twice"


class ClaimsOfTwice:
    """Count, in the new tokens alone."""

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        return "twice" if tokens.count(params.token) == 2 and tokens[-1] == params.token else None


class ClaimsOfSearch(ScoresOfSearch):
    """The search of the kit, written over plain lists: which texts it returns."""

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[tuple[int, ...], float | None]]:
        frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        ended: list[tuple[tuple[int, ...], float | None]] = []
        while frontier:
            grown = []
            for tokens, score in frontier:
                logits = model.logits_after((*request.prompt_ids, *tokens)).clone()
                if len(tokens) < request.limits.min_new_tokens:
                    logits[list(request.end_ids)] = -torch.inf
                best = logits.log_softmax(-1).topk(min(params.children, len(logits)))
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    if value > -torch.inf:
                        grown.append(((*tokens, token), score + value))
            grown.sort(key=lambda pair: -pair[1])
            frontier = []
            for tokens, score in grown:
                if tokens[-1] in request.end_ids or len(tokens) == request.limits.max_new_tokens:
                    ended.append((tokens, score))
                elif len(frontier) < params.width:
                    frontier.append((tokens, score))
            if params.enough and len(ended) >= params.enough:
                break
        return sorted(ended, key=lambda pair: -(pair[1] or 0.0))[: request.n]


class Rationed(Plugin):
    """End all texts of a request, with a word of its own, when they have used up a ration of tokens together."""

    class Params(Parameters):
        ration: int = Field(4, ge=1, le=12)

    def open(self, request: PreparedRequest) -> dict[str, int]:
        return {"used": 0}

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        own = step.own(self)
        for child, request in enumerate(growth.request.tolist()):
            own[request]["used"] += 1
            if own[request]["used"] >= self.params.ration:
                growth.finish[child] = "rationed"
