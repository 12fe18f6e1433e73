"""A suffix automaton: all that was ever said, folded so that what followed any phrase is found by walking it.

Its states are the phrases of the texts that it was fed, those that always occur together as one. A state's link leads
to its longest ending that occurs elsewhere too. Feeding a token takes constant time in the mean (Blumer et al. 1985); a
state's count says how often its phrases were read.
"""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
FAR = 48
"""Links that are followed at most when occurrences are counted: `aaaa...` has as many as tokens."""


class Automaton:
    """The phrases of some texts. Grows in place."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that it was fed."""
        self._next: dict[int, int] = {}
        self._follow: list[list[int]] = [[]]
        self._link = [-1]
        self._length = [0]
        self._count = [0]

    def feed(self, tokens: Iterable[int], last: int = ROOT) -> int:
        """Read on after the state `last` (the root: a new text). Give the state of the whole text."""
        for token in tokens:
            last = self._extend(last, token)
            state, steps = last, 0
            while state > ROOT and steps < FAR:
                self._count[state] += 1
                state, steps = self._link[state], steps + 1
            self.tokens += 1
        return last

    def find(self, tokens: Iterable[int], state: int = ROOT, matched: int = 0) -> tuple[int, int]:
        """Walk on by `tokens`: give the state of the longest ending that was ever read, and that ending's length."""
        for token in tokens:
            while state != ROOT and state << 32 | token not in self._next:
                state = self._link[state]
                matched = self._length[state]
            following = self._next.get(state << 32 | token)
            state, matched = (ROOT, 0) if following is None else (following, matched + 1)
        return state, matched

    def shorter(self, state: int) -> tuple[int, int]:
        """Give the state of the longest ending that occurs elsewhere too, and its length."""
        link = self._link[state]
        return (link, self._length[link]) if link >= 0 else (ROOT, 0)

    def follows(self, state: int) -> bool:
        """Tell whether anything was read after a state."""
        return bool(self._follow[state])

    def following(self, state: int) -> list[tuple[int, int, int]]:
        """List what was read after a state: (token, its state, how often)."""
        states = [(token, self._next[state << 32 | token]) for token in self._follow[state]]
        return [(token, to, self._count[to]) for token, to in states]

    def _extend(self, last: int, token: int) -> int:
        there = self._next.get(last << 32 | token)
        if there is not None:  # read before, in another text
            if self._length[there] == self._length[last] + 1:
                return there
            return self._split(last, token, there)
        new = self._state(self._length[last] + 1)
        state = last
        while state >= 0 and state << 32 | token not in self._next:
            self._go(state, token, new)
            state = self._link[state]
        if state < 0:
            self._link[new] = ROOT
        else:
            there = self._next[state << 32 | token]
            fits = self._length[there] == self._length[state] + 1
            self._link[new] = there if fits else self._split(state, token, there)
        return new

    def _split(self, state: int, token: int, there: int) -> int:
        """Give the shorter phrases of a state one of their own: they have been read where the longer ones were not."""
        part = self._state(self._length[state] + 1)
        for following in self._follow[there]:
            self._go(part, following, self._next[there << 32 | following])
        self._link[part], self._count[part] = self._link[there], self._count[there]
        self._link[there] = part
        while state >= 0 and self._next.get(state << 32 | token) == there:
            self._next[state << 32 | token] = part
            state = self._link[state]
        return part

    def _state(self, length: int) -> int:
        self._follow.append([])
        self._link.append(ROOT)
        self._length.append(length)
        self._count.append(0)
        return len(self._length) - 1

    def _go(self, state: int, token: int, to: int) -> None:
        self._next[state << 32 | token] = to
        self._follow[state].append(token)
