"""Strategies and plugins that stand beside the one that is checked: hosts for a plugin, neighbours in a batch.

Each is about as long as its idea. Together they use what the hooks offer: several children a row, pruning, forking
streams, holding rows, path states, parameters of a request, a companion, a finish reason of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Companion, Parameters, Plugin, TokenId, TokenIds, hookimpl, per_request
from unspool.request import PreparedRequest
from unspool.step import Step

# ---- strategies ------------------------------------------------------------------------------------------------------


class Likeliest(Plugin):
    """Grow each row by its likeliest token."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Choose the first of the likeliest."""
        return Growth(row=torch.arange(len(logits)), token=logits.argmax(-1))


class Drawn(Plugin):
    """Grow each row by a token drawn from its distribution."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Draw by Gumbel noise."""
        return Growth(row=torch.arange(len(logits)), token=(logits + step.gumbel("drawn")).argmax(-1))


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


# ---- plugins ---------------------------------------------------------------------------------------------------------


class Bias(Plugin):
    """Add to the logit of one token; both may differ between the requests of a group."""

    row_local = True

    class Params(Parameters):
        token: TokenId = per_request(1)
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
        logits /= 1 + 0.1 * logits.new_tensor(step.states(self)).unsqueeze(-1)


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
        prompt: TokenIds = (0, 1)
        scale: float = 0.7

    def companions(self) -> Mapping[str, Companion]:
        return {"without": Companion(prompt=self.params.prompt, every_row=True)}

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        # The difference of what was said, not of what is left: a forbidden token stays at -inf, and 0 * inf is NaN.
        logits += self.params.scale * (step.raw - step.companion("without")).to(logits)


class Fails(Plugin):
    """Raise in one hook once a text has so many tokens: a neighbour that must hurt nobody else."""

    row_local = True

    class Params(Parameters):
        hook: Literal["pre_forward", "logits_transform", "stop_check"] = "logits_transform"
        after: int = per_request(1, ge=0)

    def _due(self, hook: str, step: Step) -> None:
        if self.params.hook == hook and bool((step.length >= step.values(self, "after")).any()):
            raise ZeroDivisionError("as it was asked to")

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        self._due("pre_forward", step)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        self._due("logits_transform", step)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        self._due("stop_check", step)
