"""Brute force: every text that can come, and how likely it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from unspool_testing.table import Path, TableModel

Transform = Callable[[Path, Tensor], Tensor]
"""New tokens so far, logits `[vocab]` -> transformed logits `[vocab]`; -inf forbids a token."""


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
