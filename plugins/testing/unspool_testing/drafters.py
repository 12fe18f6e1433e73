"""Drafters that try to be seen: they guess wildly, hang ends and impossible tokens, go past every limit, or are right.

A law says that no drafter changes a text: a child is never chosen because a draft exists. It is checked with these.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from unspool.plugin import Companion, Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.pipeline import Pipeline
    from unspool.step import Step


class GuessChains(Plugin):
    """Hang a chain of random tokens below every row, past whatever limit there is."""

    row_local = True

    class Params(Parameters):
        """How long, and which guesses."""

        length: int = Field(4, ge=1, description="Drafts in a chain.")
        vocab_size: int = Field(5, ge=1, description="Guesses lie below it.")
        seed: int = Field(0, description="Chooses the guesses.")

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang the chains."""
        nodes, guess = step.node, _guesses(self.params.seed, step)
        for _ in range(self.params.length):
            nodes = step.draft(nodes, [guess.randrange(self.params.vocab_size) for _ in nodes])


class GuessTrees(Plugin):
    """Hang a random tree below every row, some of its tokens twice."""

    row_local = True

    class Params(Parameters):
        """How wide and deep, and which guesses."""

        width: int = Field(3, ge=1, description="Guesses below every node (equal ones are one node).")
        depth: int = Field(3, ge=1, description="Of the tree.")
        vocab_size: int = Field(5, ge=1, description="Guesses lie below it.")
        seed: int = Field(0, description="Chooses the guesses.")

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang the trees."""
        nodes, guess = step.node, _guesses(self.params.seed, step)
        for _ in range(self.params.depth):
            parents = nodes.repeat_interleave(self.params.width)
            drafts = step.draft(parents, [guess.randrange(self.params.vocab_size) for _ in parents])
            nodes = torch.tensor(sorted(set(drafts.tolist()) - {-1}), dtype=torch.int64)


class Recall(Plugin):
    """Know texts beforehand: below every row, hang all that follows its path in any of them.

    With the text that comes it is always right; with many texts it hangs trees.
    """

    row_local = True

    class Params(Parameters):
        """What it knows."""

        texts: tuple[tuple[int, ...], ...] = per_request((), description="New tokens of the texts, prompt left out.")
        length: int = Field(8, ge=1, description="Most drafts in a chain.")

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang what follows."""
        paths, lengths = step.paths()
        for row, node in enumerate(step.node.tolist()):
            request = step.requests[int(step.request[row])]
            path = tuple(paths[row, len(request.prompt_ids) : int(lengths[row])].tolist())
            for text in request.parameters[self.name].texts:  # type: ignore[attr-defined]
                parent = torch.tensor([node])
                for token in text[len(path) : len(path) + self.params.length] if text[: len(path)] == path else ():
                    parent = step.draft(parent, [token])


class DraftModel(Plugin):
    """Let a small model guess what the whole pipeline would choose, were the small model the target."""

    row_local = True

    class Params(Parameters):
        """Which model, and how far it goes."""

        model: str | None = Field(None, description="The draft model's name; none: the target itself.")
        layers: int | None = Field(None, ge=1, description="Run only its first layers.")
        length: int = Field(3, ge=1, description="Drafts in a chain.")

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the draft model."""
        return {"draft": Companion(model=self.params.model, layers=self.params.layers)}

    def refuse(self, pipeline: Pipeline) -> str | None:
        """Refuse strategies whose choice cannot be asked for row by row."""
        strategy = pipeline.strategy
        return (
            None if strategy.row_local and not strategy.holds else f"{strategy.name!r} cannot say what it would choose"
        )

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Draft one token a row after another."""
        nodes, rows = step.node, torch.arange(len(step.node))
        for drafted in range(self.params.length):
            nodes = nodes.where(step.budget > drafted, -1)
            if (nodes < 0).all():
                return
            nodes = step.draft(nodes, step.propose(rows, nodes, step.companion("draft", nodes)))


def _guesses(seed: int, step: Step) -> random.Random:
    return random.Random(f"{seed}/{[r.seed for r in step.requests]}/{step.length.tolist()}")
