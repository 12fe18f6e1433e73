"""Ways to the end: how few tokens complete a text that has begun.

What is wanted near the end of a budget is some short completion, not a proof that none is shorter. It is looked for in
depth, from short limits to long ones, and at every place those tokens are tried first that close something: brackets,
quotes, then other marks, digits, letters, and last what opens or continues. Text that the language forces is one move.
A way that was found is kept as long as it still leads to the end, so that most tokens cost one walk along it.

Costs a mask a place that is looked at, some 50 microseconds; a search looks at no more than `PLACES` for each limit.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from unspool_constrained.engine import Engine, Position
from unspool_constrained.vocabulary import Vocabulary

LONGEST = 256
"""Tokens of the longest way that is looked for."""
PLACES = 160
"""Places that a search looks at, for each limit of length."""
_KINDS = (
    b"}])>",
    b"\"'`",
    b"",
    b"0123456789",
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    b"\n",
    b" \t\r",
    b",:;",
    b"{[(<",
)
"""Kinds of bytes, those that close first; the empty kind is all others."""


class Finder:
    """Finds ways to the end.

    Args:
        engine: knows what may follow.
        vocabulary: whose tokens are used.
        ends: the request has end tokens, so a text that may stop can be ended.
    """

    def __init__(self, engine: Engine, vocabulary: Vocabulary, ends: bool) -> None:
        self._engine, self._vocabulary, self._ends = engine, vocabulary, ends

    def closed(self, position: Position) -> bool:
        """Tell whether the text can end here."""
        return position.has_stopped or (position.may_stop and self._ends)

    def after(self, way: tuple[int, ...] | None, token: int, position: Position) -> tuple[int, ...] | None:
        """Give a way from `position`, which stands a token after the place that `way` begins at."""
        if way and way[0] == token:
            return way[1:]
        kept = None if way is None else self.leads(position, way)
        return self.search(position) if kept is None else kept

    def leads(self, position: Position, way: tuple[int, ...]) -> tuple[int, ...] | None:
        """Follow a way, and give what of it was needed to come to an end; None: it does not lead there."""
        for taken, token in enumerate(way):
            if self.closed(position):
                return way[:taken]
            after = position.advance(token)
            if after is None:
                return None
            position = after
        return way if self.closed(position) else None

    def search(self, position: Position) -> tuple[int, ...] | None:
        """Look for a short way from `position`."""
        limit = 1
        while limit <= LONGEST:
            self._left = PLACES
            way = self._deepen(position, limit)
            if way is not None:
                return way
            limit *= 2
        return None

    def _deepen(self, position: Position, limit: int) -> tuple[int, ...] | None:
        if self.closed(position):
            return ()
        if limit < 1 or self._left < 1:
            return None
        self._left -= 1
        forced = position.forced(limit)
        for move in [tuple(forced)] if forced else [(token,) for token in self._candidates(position)]:
            after: Position | None = position
            for token in move:
                after = after.advance(token) if after is not None else None
            rest = None if after is None else self._deepen(after, limit - len(move))
            if rest is not None:
                return (*move, *rest)
        return None

    def _candidates(self, position: Position) -> list[int]:
        """List one token of each kind that may follow, those that close first."""
        octets = self._engine.masks([position])[0].view(np.uint8)
        allowed = np.unpackbits(octets, count=len(self._vocabulary), bitorder="little").view(bool)
        order, kinds = self._order
        there = allowed[order]
        _, first = np.unique(kinds[there], return_index=True)
        found: list[int] = order[there][first].tolist()
        return found

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _ordered(self._vocabulary)


def _ordered(vocabulary: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort the tokens by kind, and give both. A token is of the last kind that it has a byte of; long ones come first
    where they close, short ones elsewhere.
    """
    known = vocabulary.kinds
    if known is None:
        kind_of = np.full(256, 2, dtype=np.int64)
        for kind, characters in enumerate(_KINDS):
            kind_of[list(characters)] = kind
        kinds = np.array([max((int(kind_of[b]) for b in token), default=len(_KINDS)) for token in vocabulary.tokens])
        sizes = np.array([len(token) for token in vocabulary.tokens])
        order = np.lexsort((np.arange(len(kinds)), np.where(kinds < 2, -sizes, sizes), kinds))
        known = vocabulary.kinds = (order, kinds[order])
    return known
