"""Guesses below the rows of a step: chains and trees of tokens, hung within each row's budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from unspool.step import Step


class Guess(NamedTuple):
    """One draft of a row.

    Args:
        parent: its parent's number among the row's guesses, a smaller one than its own; -1: the row.
        token: what is guessed.
        sure: how sure it is that its parent goes on so, from 0 to 1.
    """

    parent: int
    token: int
    sure: float


def sure(matched: int, depth: int) -> float:
    """Say how sure it is that a text goes on as it did after so many tokens that match, at a depth from 0."""
    return 1 - 1 / (1 + matched + depth)


def hang(step: Step, guesses: Sequence[Sequence[Guess]], *, adapt: bool) -> list[dict[int, int]]:
    """Hang each row's guesses, a depth of all rows at a time.

    Args:
        step: of `pre_forward`.
        guesses: of each row, the likeliest first; what goes over its budget is left out.
        adapt: run those alone that are worth their rows.

    Returns:
        The nodes of each row's guesses, by their numbers.
    """
    nodes: list[dict[int, int]] = [{} for _ in guesses]
    below: list[dict[int, list[int]]] = [{} for _ in guesses]
    for its, children, budget in zip(guesses, below, step.budget.tolist(), strict=True):
        for number, guess in enumerate(its[:budget]):
            children.setdefault(guess.parent, []).append(number)
    ready = [(row, number, node) for row, node in enumerate(step.node.tolist()) for number in below[row].get(-1, ())]
    while ready:
        chosen = [guesses[row][number] for row, number, _ in ready]
        confidence = [guess.sure for guess in chosen] if adapt else None
        hung = step.draft([node for _, _, node in ready], [guess.token for guess in chosen], None, confidence).tolist()
        following = []
        for (row, parent, _), node in zip(ready, hung, strict=True):
            if node >= 0:
                nodes[row][parent] = node
                following += [(row, number, node) for number in below[row].get(parent, ())]
        ready = following
    return nodes
