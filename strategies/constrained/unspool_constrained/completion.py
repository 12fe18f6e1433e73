"""Ways to the end: how few tokens complete a text that has begun.

What is wanted near the end of a budget is some short completion, not a proof that none is shorter. It is looked for in
depth, from short limits to long ones. At every place those tokens are tried first that end the text, then those after
which the language leaves no choice: they finished something. Among the others those that close come first: brackets,
quotes, then other marks, digits (0 after the others, with which a number is positive), letters, and last what opens or
continues. Text that the language forces is one move.
A way that was known is taken up again wherever the rest of it leads to the end: most tokens change nothing of it, and
what a text needs at its end it needs wherever it is now.

Costs a mask a place that is looked at, some 50 microseconds, and most tokens need none; a search looks at no more than
`PLACES` for each limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from unspool_constrained.engine import Compiled, Engine, Position
from unspool_constrained.vocabulary import Vocabulary

LONGEST = 256
"""Tokens of the longest way that is looked for."""
PLACES = 160
"""Places that a search looks at, for each limit of length."""
_KINDS = (
    b"}])>",
    b'"',
    b"'`",
    b"",
    b"123456789",
    b"0",
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    b"\n",
    b" \t\r",
    b",:;",
    b"{[(<",
)
"""Kinds of bytes, those that close first; the empty kind is all others."""


_FIRST: WeakKeyDictionary[Compiled, dict[bool, tuple[int, ...] | None]] = WeakKeyDictionary()
"""Of languages that were asked about: the way from the beginning, with end tokens and without."""


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
        return self.search(position, 2 * len(way or ()), way or ()) if kept is None else kept

    def leads(self, position: Position, way: tuple[int, ...]) -> tuple[int, ...] | None:
        """Follow a way, and give what of it was needed to come to an end; None: it does not lead there."""
        taken = position.closes_after(way, with_end=self._ends)
        return None if taken is None else way[:taken]

    def first(self, compiled: Compiled) -> tuple[int, ...] | None:
        """Look for a way from the beginning of a language, once for all requests."""
        known = _FIRST.setdefault(compiled, {})
        if self._ends not in known:
            known[self._ends] = self.search(compiled.start())
        return known[self._ends]

    def search(self, position: Position, limit: int = 1, known: tuple[int, ...] = ()) -> tuple[int, ...] | None:
        """Look for a short way from `position`, at first of at most `limit` tokens.

        Args:
            position: where to begin.
            limit: of the first attempt; it is doubled until a way is found or it passes `LONGEST`.
            known: a way from elsewhere, whose end may do here.
        """
        expected = limit = max(1, min(limit, LONGEST))
        while limit <= LONGEST:
            self._left, self._known = PLACES, known
            way = self._deepen(position, limit)
            if way is not None:
                return way if limit == expected else self._shortened(position, way)
            limit *= 2
        return None

    def _shortened(self, position: Position, way: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out what can be left out in one piece: what is looked for in depth may say more than it has to."""
        taken: tuple[int, ...] = ()
        while way:
            ends = (self.leads(position, way[start:]) for start in range(len(way) - 1, 0, -1))
            way = next((end for end in ends if end is not None), way)
            if way:
                after = position.advance(way[0])
                assert after is not None
                taken, position, way = (*taken, way[0]), after, way[1:]
        return taken

    def _deepen(self, position: Position, limit: int) -> tuple[int, ...] | None:
        if self.closed(position):
            return ()
        if limit < 1 or self._left < 1:
            return None
        self._left -= 1
        if (rest := self._rest(position, limit)) is not None:
            return rest
        forced = position.forced(limit)
        for move, after in self._moves(position, [forced] if forced else [[t] for t in self._candidates(position)]):
            rest = self._deepen(after, limit - len(move))
            if rest is not None:
                return (*move, *rest)
        return None

    def _moves(self, position: Position, moves: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], Position]]:
        """List moves with where they lead: those to an end, those after which something is forced, others."""
        found: list[tuple[int, Sequence[int], Position]] = []
        for move in moves:
            after: Position | None = position
            for token in move:
                after = after.advance(token) if after is not None else None
            if after is not None:
                rank = 0 if self.closed(after) else 1 if len(moves) == 1 or after.forced(1) else 2
                found.append((rank, move, after))
        return [(move, after) for _, move, after in sorted(found, key=lambda one: one[0])]

    def _rest(self, position: Position, limit: int) -> tuple[int, ...] | None:
        """Give the longest end of the known way, of at most `limit` tokens, that leads to the end from here."""
        if not self._known:
            return None
        for start in np.flatnonzero(self._allowed(position)[list(self._known)]).tolist():
            if len(self._known) - start <= limit:
                rest = self.leads(position, self._known[start:])
                if rest is not None:
                    return rest
        return None

    def _allowed(self, position: Position) -> NDArray[np.bool_]:
        """Say of each token whether it may follow."""
        octets = self._engine.masks([position])[0]
        return np.unpackbits(octets, count=len(self._vocabulary), bitorder="little").view(bool)

    def _candidates(self, position: Position) -> list[int]:
        """List one token of each kind that may follow, those that close first."""
        allowed = self._allowed(position)
        firsts = ((kind, int(allowed[kind].argmax())) for kind in self._kinds)
        return [int(kind[first]) for kind, first in firsts if allowed[kind[first]]]

    @cached_property
    def _kinds(self) -> list[NDArray[np.int64]]:
        return _by_kind(self._vocabulary)


def _by_kind(vocabulary: Vocabulary) -> list[NDArray[np.int64]]:
    """List the tokens by kind: the last one that a token has a byte of. Of those that close long ones come first."""
    known = vocabulary.kinds
    if known is None:
        kind_of = np.full(256, _KINDS.index(b""), dtype=np.int64)
        for kind, characters in enumerate(_KINDS):
            kind_of[list(characters)] = kind
        kinds = np.array([max((int(kind_of[b]) for b in token), default=len(_KINDS)) for token in vocabulary.tokens])
        sizes = np.array([len(token) for token in vocabulary.tokens])
        order = np.lexsort((np.arange(len(kinds)), np.where(kinds < 3, -sizes, sizes), kinds))
        pieces = np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1)
        known = vocabulary.kinds = [piece for piece in pieces if len(piece)]
    return known
