"""What a grammar engine must be able to do, and nothing of how: plugins know these protocols alone.

A language is compiled once for a vocabulary. A position is where a text stands in it; positions are immutable, so that
every branch, draft and copy of a text shares its ancestors'. `may_stop` says that the text may end here, `has_stopped`
that it must: a position that has stopped is never asked for another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from unspool.masks import Octets
from unspool_constrained.languages import Language
from unspool_constrained.vocabulary import Vocabulary


class GrammarError(ValueError):
    """A language that the engine refuses, or that grew too large while a text was written; the message says why."""


class Position(Protocol):
    """Where a text stands in a language."""

    @property
    def may_stop(self) -> bool:
        """Tell whether the text is complete as it is."""

    @property
    def has_stopped(self) -> bool:
        """Tell whether nothing but an end can follow."""

    def advance(self, token: int) -> Position | None:
        """Give the position one token later, or None if that token cannot follow. This position stays as it is."""

    def closes_after(self, tokens: Sequence[int], *, with_end: bool) -> int | None:
        """Say how many of these tokens bring the text to where it may end, or must without end tokens; else None.

        Where no token is needed it is 0. Where several numbers would do it may be any of them.
        """

    def forced(self, most: int) -> list[int]:
        """List the tokens that the language leaves no choice about, canonically tokenized, at most so many."""


class Compiled(Protocol):
    """A language, compiled for a vocabulary. Any thread may use it."""

    def start(self) -> Position:
        """Give the position before any text."""


class Engine(Protocol):
    """Compiles languages, and says which tokens may follow."""

    def check(self, language: Language) -> None:
        """Raise a `GrammarError` where a language is refused whatever the vocabulary."""

    def compile(self, language: Language, vocabulary: Vocabulary) -> Compiled:
        """Compile a language, or find it compiled.

        Raises:
            GrammarError: the language is refused.
        """

    def prefetch(self, positions: Sequence[Position]) -> None:
        """Begin, on another thread, to find out which tokens may follow."""

    def masks(self, positions: Sequence[Position]) -> Octets:
        """Say which tokens of the vocabulary may follow: `[positions, octets]`, a copy. Ends are not among them.

        Raises:
            GrammarError: a language grew too large.
        """
