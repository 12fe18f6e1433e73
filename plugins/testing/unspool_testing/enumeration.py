"""Brute force: every text that can come, and how likely it is, by hand or as the plugins of a pipeline claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from unspool.request import PreparedRequest
from unspool_testing.claims import Row, floats
from unspool_testing.known import Known
from unspool_testing.table import Path, TableModel

Transform = Callable[[Path, Tensor], Tensor]
"""New tokens so far, logits `[vocab]` -> transformed logits `[vocab]`; -inf forbids a token."""

Choice = Callable[[Any, Row], Sequence[float]]
"""A claim `distribution`."""


def enumerate_texts(
    model: TableModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_ids: Collection[int] = (0,),
    *,
    min_new_tokens: int = 0,
    transform: Transform = lambda _, logits: logits,
) -> dict[Path, float]:
    """Give every text that sampling can come to, with its log-probability.

    A text ends in the first end token, or has `max_new_tokens` tokens. End tokens are banned below `min_new_tokens`
    before `transform` acts. Where everything is forbidden the path ends without a text, so probabilities sum to less
    than 1.
    """
    texts: dict[Path, float] = {}
    frontier: list[tuple[Path, float]] = [((), 0.0)]
    while frontier:
        path, logprob = frontier.pop()
        logits = model.logits_after((*prompt, *path)).clone()
        if len(path) < min_new_tokens:
            logits[list(end_ids)] = -torch.inf
        for token, value in enumerate(transform(path, logits).log_softmax(-1).tolist()):
            if value > -torch.inf:
                child = (*path, token), logprob + value
                if token in end_ids or len(path) + 1 == max_new_tokens:
                    texts[child[0]] = child[1]
                else:
                    frontier.append(child)
    return texts


def claimed_texts(
    known: Known, request: PreparedRequest, model: TableModel, choice: Choice | None = None
) -> dict[Path, tuple[float, ...]]:
    """Give every text of a request, with the log-probability of each token, by the claims of its plugins.

    Args:
        known: the plugins and what they claim.
        request: what is decoded. Each of its plugins that transforms must claim a `transform` that needs no noise.
        model: the target.
        choice: the strategy's claim `distribution`; None: each token comes with its probability.
    """
    claims = [
        (request.parameters[plugin.name], claim)
        for plugin, _ in request.pipeline.implementations("logits_transform")
        if (claim := known.claim(plugin.name, "transform")) is not None
    ]
    if choice is not None:
        claims.append((request.pipeline.strategy.params, lambda params, row: [_log(p) for p in choice(params, row)]))
    limits, along = request.limits, {}

    def transform(tokens: Path, logits: Tensor) -> Tensor:
        for params, claim in claims:
            if bool(logits.amax() > -torch.inf):
                logits = logits.new_tensor(claim(params, row_without_noise(request, tokens, logits, model)))
        along[tokens] = logits.log_softmax(-1).tolist()
        return logits

    texts = enumerate_texts(
        model,
        request.prompt_ids,
        limits.max_new_tokens,
        request.end_ids,
        min_new_tokens=limits.min_new_tokens,
        transform=transform,
    )
    return {text: tuple(along[text[:place]][token] for place, token in enumerate(text)) for text in texts}


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def row_without_noise(request: PreparedRequest, tokens: Path, logits: Tensor, model: TableModel) -> Row:
    """Show a place in a text to a claim that speaks of all noise at once."""

    def uniform(purpose: str) -> float:
        raise ValueError(f"the number {purpose!r} is not known: this claim is about all noise at once")

    return Row(
        request.prompt_ids, tokens, floats(logits), (), request.end_ids, request.limits.max_new_tokens, uniform, model
    )
