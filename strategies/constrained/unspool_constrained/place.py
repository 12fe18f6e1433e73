"""The path state of a constraint: where a path stands in its language, and how it could be brought to an end."""

from __future__ import annotations

from collections.abc import Sequence

from unspool_constrained.completion import Finder
from unspool_constrained.engine import Position


class Place:
    """Where a path stands.

    Args:
        position: in the language.
        ends: the tokens that end a text.
        finder: finds ways to the end; None: nobody needs one.
        before: the place one token earlier, and that token; None: there is no text yet.
        way: from there to the end.
    """

    __slots__ = ("_asked", "_before", "_finder", "_way", "ends", "position")

    def __init__(
        self,
        position: Position,
        ends: Sequence[int],
        finder: Finder | None = None,
        before: tuple[Place, int] | None = None,
        way: tuple[int, ...] | None = None,
    ) -> None:
        self.position, self.ends, self._finder = position, ends, finder
        self._before = before if finder is not None else None
        self._way, self._asked = way, before is None

    def advance(self, token: int) -> Place | None:
        """Give the place one token later, or None if the language forbids that token."""
        after = self.position.advance(token)
        return None if after is None else Place(after, self.ends, self._finder, (self, token))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self.position == other.position

    def __hash__(self) -> int:
        return hash(self.position)

    def __deepcopy__(self, memo: object) -> Place:
        return self  # nothing of it changes but what is remembered

    @property
    def finder(self) -> Finder | None:
        """Give what finds ways to the end."""
        return self._finder

    def way(self) -> tuple[int, ...] | None:
        """Give tokens that complete the text, none if it may stop as it is; None where none were found.

        It is a function of the path alone: the way of the place before, where that still leads to the end.
        """
        assert self._finder is not None
        unknown: list[Place] = []
        place: Place | None = self
        while place is not None and not place._asked:
            unknown.append(place)
            place = place._before[0] if place._before is not None else None
        for place in reversed(unknown):
            before, place._before, place._asked = place._before, None, True
            assert before is not None
            place._way = self._finder.after(before[0]._way, before[1], place.position)
        return self._way
