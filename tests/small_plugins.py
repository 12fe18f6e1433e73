"""Small plugins that use all of the hooks, each about as long as its idea. The laws are checked with them.

Together they cover what HOOKS.md offers: several children a row, pruning, forking streams, holding rows, path states,
states that read logprobs, states of the request, companions, hidden states, parameters of a request, finish reasons of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Companion, Parameters, Plugin, hookimpl, per_request
from unspool.request import Hypothesis, PreparedRequest, Result
from unspool.step import Step

# ---- strategies ------------------------------------------------------------------------------------------------------


class Impatient(Plugin):
    """Sample, and guess its own next tokens: a strategy's own drafts are never deleted, whatever the budget is."""

    row_local = True

    class Params(Parameters):
        depth: int = Field(1, ge=1)
        tokens: tuple[int, ...] = (1, 2, 3)

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        nodes, width = step.node, len(self.params.tokens)
        for _ in range(self.params.depth):
            nodes = step.draft(nodes.repeat_interleave(width), list(self.params.tokens) * len(nodes))

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        return Growth(row=torch.arange(len(logits)), token=(logits + step.gumbel("impatient")).argmax(-1))


class Voting(Plugin):
    """Sample, and rank texts by how many say the same: `rank` reads more than scores."""

    row_local = True

    def start(self, request: PreparedRequest) -> int:
        return 2 * request.n

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        said = [h.token_ids for h in hypotheses]
        return sorted(hypotheses, key=lambda h: (-said.count(h.token_ids), h.token_ids, h.stream))

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        return Growth(row=torch.arange(len(logits)), token=(logits + step.gumbel("vote")).argmax(-1))


# ---- transforms ------------------------------------------------------------------------------------------------------


class Calm(Plugin):
    """Sharpen the distribution after surprises: a path state that reads logprobs (as mirostat's does)."""

    row_local = True
    reads_logprob = True

    def initial(self, request: PreparedRequest) -> float:
        return 1.0

    def advance(self, state: float, token: int, logprob: float = 0.0) -> float:
        return 0.5 * state + 0.5 * (1 - logprob)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits *= torch.tensor(step.states(self), dtype=logits.dtype).unsqueeze(-1)


class FirstLayers(Plugin):
    """Push away from what the first layers say: a companion that is asked, not run beside every row."""

    row_local = True

    class Params(Parameters):
        layers: int = Field(1, ge=1)

    def companions(self) -> Mapping[str, Companion]:
        return {"amateur": Companion(layers=self.params.layers)}

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits -= 0.5 * step.companion("amateur").to(logits)


class EarlyExit(Plugin):
    """Mix in what an earlier layer says through the head (as DoLa does)."""

    row_local = True
    hidden = (1,)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits += 0.5 * step.head(step.hidden(1)).to(logits)


class Mood(Plugin):
    """Mix in the mean of an earlier layer along the whole path."""

    row_local = True
    path_hidden = (2,)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        hidden, there = step.path_hidden(2)
        mean = (hidden * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)
        logits += 0.5 * step.head(mean).to(logits)


class Sated(Plugin):
    """End a text, with a word of its own, at the second `token` in it."""

    row_local = True

    class Params(Parameters):
        token: int = 3

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        paths, lengths = growth.paths()
        for child, request in enumerate(growth.request.tolist()):
            text = paths[child, len(step.requests[request].prompt_ids) : int(lengths[child])]
            if int((text == self.params.token).sum()) == 2:
                growth.finish[child] = "sated"


class Ledger(Plugin):
    """Count rounds in the request's own object; what was opened and closed stands in `books`."""

    row_local = True
    books: ClassVar[list[tuple[str, Any]]] = []

    class Params(Parameters):
        opens: bool = True
        closes: bool = True

    def open(self, request: PreparedRequest) -> dict[str, Any]:
        if not self.params.opens:
            raise OSError("the ledger does not open")
        self.books.append(("open", request))
        return {"request": request}

    def close(self, own: dict[str, Any], result: Result) -> None:
        self.books.append(("close", own["request"]))
        if not self.params.closes:
            raise OSError("the ledger does not close")


# ---- trouble ---------------------------------------------------------------------------------------------------------


class Faulty(Plugin):
    """Go wrong at one place: in a hook or in a path state, once the text has so many tokens."""

    row_local = True

    class Params(Parameters):
        where: str = "logits_transform"
        after: int = per_request(2)
        makes: Literal["raise", "nan", "inf"] = "raise"

    def _due(self, step: Step) -> Iterator[int]:
        after = step.values(self, "after")
        return iter((step.length >= after).nonzero().squeeze(1).tolist())

    def _go_wrong(self, step: Step, where: str) -> None:
        if self.params.where == where and self.params.makes == "raise" and any(True for _ in self._due(step)):
            raise ZeroDivisionError("as it was asked to")

    def initial(self, request: PreparedRequest) -> tuple[int, int]:
        return 0, request.parameters[self.name].after  # type: ignore[attr-defined]

    def advance(self, state: tuple[int, int], token: int, logprob: float = 0.0) -> tuple[int, int]:
        if self.params.where == "advance" and state[0] >= state[1]:
            raise ZeroDivisionError("as it was asked to")
        return state[0] + 1, state[1]

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        step.draft(step.node, [1] * len(step.node))
        self._go_wrong(step, "pre_forward")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        self._go_wrong(step, "logits_transform")
        if self.params.makes != "raise":
            for row in self._due(step):
                logits[row, 1] = float(self.params.makes)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        self._go_wrong(step, "stop_check")


class BadStrategy(Plugin):
    """Answer nonsense once the text has so many tokens; greedy before."""

    row_local = True

    class Params(Parameters):
        answer: str = "raise"
        after: int = per_request(2)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        row, token = torch.arange(len(logits)), logits.argmax(-1)
        if not bool((step.length >= step.values(self, "after")).any()):
            return Growth(row=row, token=token)
        match self.params.answer:
            case "row":
                return Growth(row=row + len(row), token=token)
            case "token":
                return Growth(row=row, token=token + logits.shape[-1])
            case "twice":
                return Growth(row=row.repeat(2), token=token.repeat(2))
            case "shape":
                return Growth(row=row, token=token[:0])
            case "dtype":
                return Growth(row=row, token=token.double())
            case "waits":
                return Growth(row=row, token=token, waits=torch.ones_like(row))
            case "score":
                return Growth(row=row, token=token, score=torch.zeros(len(row) + 1))
            case "none":
                return None  # type: ignore[return-value]
        raise ZeroDivisionError("as it was asked to")


class Wall(Plugin):
    """Forbid everything after some token."""

    row_local = True

    class Params(Parameters):
        token: int = 2

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        paths, lengths = step.paths()
        last = paths[torch.arange(len(paths)), lengths - 1]
        logits[(last == self.params.token) & (step.length > 0)] = -torch.inf
