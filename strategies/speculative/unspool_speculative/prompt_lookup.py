"""Prompt lookup: guess that a text goes on as it did where it said the same before.

Summaries, answers about a document, edits of code and chats repeat long pieces of what stands before them. The longest
ending of a row's path (prompt included) that occurred earlier is looked up, and what followed it there is drafted; of
several places the latest counts. Where what followed reaches the end of the path it goes on with itself, so a period
is guessed for as long as you like.

    n      =  the largest n <= max_ngram with path[-n:] = path[e - n : e] for some e < length;  e the largest such
    draft  =  path[e], path[e + 1], ...

Saxena 2023; transformers' `prompt_lookup_num_tokens`. Costs no pass and no model: a search through the row's own path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_speculative.echoes import occurrences
from unspool_speculative.hang import Guess, hang, sure

if TYPE_CHECKING:
    from typing import Self

    from unspool.step import Step


class PromptLookup(Plugin):
    """Draft what followed the same words before."""

    row_local = True

    class Params(Parameters):
        """How long guesses are, and what counts as the same words."""

        main: ClassVar[str | None] = "length"
        length: int = Field(16, ge=1, le=512, description="Most drafts below a row.")
        max_ngram: int = Field(16, ge=1, le=512, description="Longest ending that is looked for.")
        min_ngram: int = Field(2, ge=1, le=512, description="Shortest ending that says anything.")
        adapt: bool = Field(True, description="Run only those drafts that are worth their rows; `false`: all.")

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.min_ngram > self.max_ngram:
                raise ValueError(f"min_ngram {self.min_ngram} is above max_ngram {self.max_ngram}")
            return self

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Look up every row's path, and hang what followed."""
        params = self.params
        if params.adapt and not any(step.takes([1.0] * len(step.node))):
            return
        paths, lengths = step.paths()
        rows = [path[:length] for path, length in zip(paths.cpu().numpy(), lengths.tolist(), strict=True)]
        found = [longest_match(path, params.max_ngram) for path in rows]
        takes = step.takes([sure(matched, 0) for matched, _ in found]) if params.adapt else [True] * len(rows)
        guesses: list[list[Guess]] = []
        for path, (matched, end), taken in zip(rows, found, takes, strict=True):
            chain = follow(path, end, params.length) if taken and matched >= params.min_ngram else []
            guesses.append([Guess(i - 1, token, sure(matched, i)) for i, token in enumerate(chain)])
        hang(step, guesses, adapt=params.adapt)


def longest_match(path: NDArray[np.int64], most: int) -> tuple[int, int]:
    """Find the longest ending of a path, up to `most` tokens, that occurred in it before.

    Returns:
        Its length, 0 if there is none, and where its latest earlier occurrence ends.
    """
    matched, ends = occurrences(path, most)
    return matched, int(ends[-1]) if matched else 0


def follow(path: NDArray[np.int64], start: int, count: int) -> list[int]:
    """Give `count` tokens of the path from `start` on; at its end it goes on with what was given."""
    tokens: list[int] = path[start : start + count].tolist()
    period = len(path) - start
    while len(tokens) < count:
        tokens.append(tokens[len(tokens) - period])
    return tokens
