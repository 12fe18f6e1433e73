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


class NarrowSearch(Plugin):
    """Grow the best children of every row, and keep the best `width` that did not end: a small beam search.

    The search is over when it has kept `enough` ended texts (never, if 0).
    """

    class Params(Parameters):
        children: int = Field(2, ge=1)
        width: int = Field(2, ge=1)
        enough: int = Field(0, ge=0)

    def open(self, request: PreparedRequest) -> dict[str, int]:
        return {"ended": 0}

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        best, token = logits.log_softmax(-1).topk(min(self.params.children, logits.shape[-1]))
        row = torch.arange(len(logits)).unsqueeze(1).expand_as(token)
        score = (step.score[:, :1] + best).flatten()
        order = score.argsort(descending=True, stable=True)
        return Growth(row=row.flatten()[order], token=token.flatten()[order], score=score[order])

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        own, kept = step.own(self), [0] * len(step.requests)
        ended = [0] * len(step.requests)
        for child, request in enumerate(growth.request.tolist()):
            if growth.finish[child] is None:
                kept[request] += 1
                growth.drop[child] = kept[request] > self.params.width
            else:
                ended[request] += 1
        for request, count in enumerate(ended):
            own[request]["ended"] += count
            if self.params.enough and own[request]["ended"] >= self.params.enough:
                growth.drop |= (growth.request == request) & torch.tensor([f is None for f in growth.finish])


class LookAheadChoice(Plugin):
    """Hold every row once: hang its k likeliest tokens as drafts, and choose when it is known what follows them.

    `surprise` prefers the token after which the model is surest; `likeness` the one whose hidden state is least like
    those on its path (contrastive search, Su et al. 2022). Where the best token is `margin` ahead, it is taken at once.
    """

    row_local = True
    holds = True
    hidden = (-1,)
    path_hidden = (-1,)

    class Params(Parameters):
        k: int = Field(3, ge=1)
        by: Literal["surprise", "likeness"] = "surprise"
        margin: float = 1e9

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        drafts = step.drafts(self)
        logprob = logits.log_softmax(-1)
        merit = torch.full(logits.shape, -torch.inf, dtype=logits.dtype)
        if len(drafts):
            row, token, node = drafts.row[drafts.ran], drafts.token[drafts.ran], drafts.node[drafts.ran]
            if self.params.by == "surprise":
                after = step.logits_of(node).to(logits).log_softmax(-1).amax(-1)
            else:
                path, there = step.path_hidden(-1)
                likeness = torch.cosine_similarity(step.hidden(-1, node).unsqueeze(1), path[row], dim=-1)
                after = -likeness.masked_fill(~there[row], -torch.inf).amax(-1)
            merit[row, token] = logprob[row, token] + after.to(logits)
        fresh = torch.ones(len(logits), dtype=torch.bool)
        fresh[drafts.row] = False
        clear = fresh & (logprob.topk(2).values.diff().squeeze(1) <= -self.params.margin)
        fresh &= ~clear
        merit[clear] = logprob[clear]
        best, choice = merit.max(-1)
        ready = (best > -torch.inf).nonzero().squeeze(1)
        for row in fresh.nonzero().squeeze(1).tolist():
            candidates = logprob[row].topk(min(self.params.k, logits.shape[-1]))
            tokens = candidates.indices[candidates.values > -torch.inf]
            step.draft(step.node[row].expand(len(tokens)), tokens)
        return Growth(row=ready, token=choice[ready])


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


class Forks(Plugin):
    """Sample, and fork in two at each of the first tokens: the children draw for themselves and may well agree.

    One branch becomes 2**forks, in streams 0, 1, ...; each child draws in a stream of its own.
    """

    row_local = True

    class Params(Parameters):
        forks: int = Field(2, ge=0)

    def start(self, request: PreparedRequest) -> int:
        return 1

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        rows, forking = torch.arange(len(logits)), step.length < self.params.forks
        left = (logits + step.gumbel("left")).argmax(-1)
        right = (logits + step.gumbel("right")).argmax(-1)[forking]
        stream = torch.cat([step.stream, step.stream[forking] + 2 ** step.length[forking]])
        return Growth(row=torch.cat([rows, rows[forking]]), token=torch.cat([left, right]), stream=stream)


class Particles(Plugin):
    """Sample n particles and, every other token, draw n anew by their weights (systematic resampling).

    A weight is what the model thinks of a token that was drawn from a flatter distribution. Scores have two columns:
    the sum of model logprobs, and the log-weight since the last resampling.
    """

    score_columns = 2

    class Params(Parameters):
        temperature: float = Field(2.0, gt=0)

    def start(self, request: PreparedRequest) -> int:
        return request.n

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        model, flat = logits.log_softmax(-1), (logits / self.params.temperature).log_softmax(-1)
        token = (flat + step.gumbel("particle")).argmax(-1).unsqueeze(1)
        gain = model.gather(1, token)
        total, weight = step.score[:, :1] + gain, step.score[:, 1:] + gain - flat.gather(1, token)
        uniform = step.uniform("resample")
        parents, streams, weights = [], [], []
        for grid in step.grid:
            rows = grid[grid >= 0]
            if int(step.length[rows[0]]) % 2:
                edges = weight[rows, 0].softmax(0).cumsum(0)
                at = (torch.arange(len(rows)) + uniform[rows[0]]) / len(rows)
                rows = rows[torch.searchsorted(edges, at.to(edges)).clamp(max=len(rows) - 1)]
                weights.append(torch.zeros(len(rows), 1, dtype=weight.dtype))
                streams.append(torch.arange(len(rows)))
            else:
                weights.append(weight[rows])
                streams.append(step.stream[rows])
            parents.append(rows)
        parent = torch.cat(parents)
        score = torch.cat([total[parent], torch.cat(weights)], 1)
        return Growth(row=parent, token=token[parent, 0], score=score, stream=torch.cat(streams))


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


class Bias(Plugin):
    """Add to the logit of one token; both may differ between the requests of a group."""

    row_local = True

    class Params(Parameters):
        token: int = per_request(1)
        bias: float = per_request(1.0)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits[torch.arange(len(logits)), step.values(self, "token")] += step.values(self, "bias")


class Tired(Plugin):
    """Flatten the distribution with what was said so far: a path state that needs no logprob."""

    row_local = True

    def initial(self, request: PreparedRequest) -> int:
        return 0

    def advance(self, state: int, token: int, logprob: float = 0.0) -> int:
        return state + token

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits /= 1 + 0.1 * torch.tensor(step.states(self)).unsqueeze(-1)


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


class NoDoubles(Plugin):
    """A grammar: no token twice in a row, and the text is complete after `most` tokens (`grammar_end`).

    Some states have no mask of their own: `advance` says that it cannot be. If it `lies`, its mask allows that.
    """

    row_local = True
    constraint = True

    class Params(Parameters):
        most: int = Field(6, ge=1)
        lies: bool = False

    def initial(self, request: PreparedRequest) -> tuple[int, int]:
        return 0, request.prompt_ids[-1]

    def advance(self, state: tuple[int, int], token: int, logprob: float = 0.0) -> tuple[int, int] | None:
        length, last = state
        return None if token == last or length == self.params.most else (length + 1, token)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        for row, (_, last) in enumerate(step.states(self)):
            logits[row, last] = 100.0 if self.params.lies and step.length[row] > 1 else -torch.inf

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        for child, state in enumerate(growth.states(self)):
            if state is not None and state[0] == self.params.most:
                growth.finish[child] = "grammar_end"


class Guidance(Plugin):
    """Push away from what the model says after another prompt (classifier-free guidance)."""

    row_local = True

    class Params(Parameters):
        prompt: tuple[int, ...] = (2, 3)
        scale: float = 0.7

    def companions(self) -> Mapping[str, Companion]:
        return {"without": Companion(prompt=self.params.prompt, every_row=True)}

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits += self.params.scale * (logits - step.companion("without").to(logits))


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
