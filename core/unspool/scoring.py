"""The log-probabilities of a given text: a strategy that chooses what it is told to, and notes what that was worth.

It hangs the given tokens as drafts, so that a whole text is judged in one pass, by the same loop, plugins and cache
that generate. That makes it the outside check that scores add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.request import PreparedRequest
from unspool.step import Step


@dataclass(frozen=True)
class Score:
    """What a given text is worth.

    Args:
        token_ids: the tokens of the continuation.
        logprobs: the log-probability of each, given all before it.
        top: the most probable alternatives at each place: (token id, log-probability), best first.
        prompt_logprobs: the model's log-probabilities of the prompt's tokens from the second on, when asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    prompt_logprobs: tuple[float, ...] | None = None

    @property
    def total(self) -> float:
        """Give the log-probability of the whole continuation."""
        return sum(self.logprobs)


@dataclass(eq=False)
class _Notes:
    logprobs: dict[int, float] = field(default_factory=dict)
    top: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)


class Given(Plugin):
    """Choose the given tokens, whatever the logits. Cost: one pass for as many tokens as the budget carries."""

    class Params(Parameters):
        """The text that is given."""

        token_ids: tuple[int, ...]
        top: int = 0

    row_local = True

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.notes = _Notes()

    def start(self, request: PreparedRequest) -> int:
        """Begin with one branch."""
        return 1

    def open(self, request: PreparedRequest) -> _Notes:
        """Keep the request's notes: each request has an instance of its own, though a group may call only one."""
        return self.notes

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang what comes next of the given text."""
        for row, (node, length) in enumerate(zip(step.node.tolist(), step.length.tolist(), strict=True)):
            parent = node
            for token in self.params.token_ids[length : length + int(step.budget[row])]:
                parent = int(step.draft([parent], [token])[0])

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Note what the given token is worth, as the last transform, and leave nothing but it."""
        given = self.params.token_ids
        at = step.length.clamp(max=len(given) - 1)
        token = torch.tensor(given, dtype=torch.int64, device=logits.device)[at]
        dead = (logits == -torch.inf).all(dim=-1, keepdim=True)
        logprobs = logits.log_softmax(-1).masked_fill(dead, -torch.inf)
        chosen = logprobs.gather(1, token.unsqueeze(1)).squeeze(1).tolist()
        top = logprobs.topk(min(self.params.top, logits.shape[1]), dim=1)
        ids, values = top.indices.tolist(), top.values.tolist()
        notes = step.own(self)
        for row, (place, request) in enumerate(zip(at.tolist(), step.request.tolist(), strict=True)):
            notes[request].logprobs[place] = chosen[row]
            notes[request].top[place] = tuple(zip(ids[row], values[row], strict=True))
        spoilt = logprobs.isnan().any(dim=-1, keepdim=True)  # left as it is, so that the core finds who made it
        logits.masked_fill_(~spoilt, -torch.inf)
        logits.scatter_(1, token.unsqueeze(1), torch.where(spoilt, torch.nan, 0.0).to(logits))

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Choose it."""
        return Growth(row=torch.arange(len(logits), device=logits.device), token=logits.argmax(dim=-1))

    def score(self, prompt_logprobs: Sequence[float] | None = None) -> Score:
        """Give what was noted; -inf from the first place on that some plugin forbade for good."""
        places = range(len(self.params.token_ids))
        return Score(
            self.params.token_ids,
            tuple(self.notes.logprobs.get(place, -torch.inf) for place in places),
            tuple(self.notes.top.get(place, ()) for place in places),
            None if prompt_logprobs is None else tuple(prompt_logprobs),
        )
