"""Where a path said before what it says last: its longest ending that occurred earlier, and what followed it there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST = 48
"""Places that are remembered, the latest: `aaaa...` has as many as tokens."""


def occurrences(path: NDArray[np.int64], most: int) -> tuple[int, NDArray[np.int64]]:
    """Find the longest ending of a path, up to `most` tokens, that occurred in it before.

    Args:
        path: `[n]` token ids, at least one.
        most: tokens that are compared.

    Returns:
        Its length, 0 if there is none, and where its earlier occurrences end, ascending: `[occurrences]`, each below n.
    """
    ends = np.flatnonzero(path[:-1] == path[-1]) + 1
    if not len(ends):
        return 0, ends
    matched = 1
    while matched < most:
        longer = ends[ends > matched]
        longer = longer[path[longer - matched - 1] == path[-matched - 1]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    return matched, ends


class Echoes:
    """The earlier occurrences of a path's longest ending. A path that goes on is not searched anew.

    Args:
        most: tokens of an ending that are compared where it is searched for.
    """

    def __init__(self, most: int) -> None:
        self.matched = 0
        """How long the ending is; at least so long, where it is `most` and more."""
        self.ends: tuple[int, ...] = ()
        """Where it occurred before: the indices of what followed."""
        self._most = most
        self._path = np.empty(0, dtype=np.int64)

    def hear(self, path: NDArray[np.int64]) -> None:
        """Go on to a path: the last one and what came after it, or any other."""
        known = len(self._path)
        if not 0 < known <= len(path) or not np.array_equal(path[:known], self._path):
            known = len(path)
            self._search(path)
        for length in range(known + 1, len(path) + 1):
            token = path[length - 1]
            self.ends = tuple(end + 1 for end in self.ends if path[end] == token)
            self.matched += 1
            if not self.ends:
                self._search(path[:length])
        self._path = path.copy()

    def following(self, ends: tuple[int, ...]) -> list[tuple[int, tuple[int, ...], int]]:
        """List what followed at some places: (token, where it ends, how often)."""
        places: dict[int, list[int]] = {}
        for end in ends:
            if end < len(self._path):
                places.setdefault(int(self._path[end]), []).append(end + 1)
        return [(token, tuple(its), len(its)) for token, its in places.items()]

    def _search(self, path: NDArray[np.int64]) -> None:
        self.matched, ends = occurrences(path, self._most)
        self.ends = tuple(ends[-MOST:].tolist())
