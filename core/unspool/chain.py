"""Arrays along paths: one number a token, the prompt's first.

The paths of one chain share an array, which grows at its end; a path that forks off copies it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Chain:
    """An array that grows at its end.

    Args:
        array: of int64, with room for more or not.
        filled: how many places of it are some path's.
    """

    __slots__ = ("array", "filled")

    def __init__(self, array: NDArray[np.int64], filled: int) -> None:
        self.array, self.filled = array, filled

    def extended(self, at: int, value: int) -> Chain:
        """Put `value` at index `at`, here if that place is free, else in a copy."""
        home = self
        if self.filled != at or at == len(self.array):
            array = np.empty(max(at + 16, 2 * at), dtype=np.int64)
            array[:at] = self.array[:at]
            home = Chain(array, at)
        home.array[at] = value
        home.filled = at + 1
        return home

    def shortened(self, at: int) -> None:
        """Let the place at index `at` be written again, if it is the last that is filled."""
        if self.filled == at + 1:
            self.filled = at
