"""The token tree: one table of nodes for all live requests.

A node is one token after one parent, named by an int. Children of one parent have different tokens, so equal paths are
one node. A node lives while something counts on it: a child, a branch that stands on it, or a draft's holder. When the
count falls to nothing it is freed, and so are its ancestors that nothing else needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unspool.chain import Chain

NONE = -1


class Tree:
    """All nodes. The lists are indexed by node; read them, and change them through the methods only.

    Args:
        on_free: called with each node as it is freed (slots and states go with it).
    """

    def __init__(self, on_free: Callable[[int], None]) -> None:
        self.parent: list[int] = []
        self.token: list[int] = []
        self.length: list[int] = []
        """New tokens on the path up to and including the node; 0 at the prompt."""
        self.states: list[tuple[Any, ...]] = []
        """Path states after the node, one for each stateful plugin of its request's pipeline."""
        self.text: list[Any] = []
        """State of the text after the node, for stop strings; None where nobody asks."""
        self._count: list[int] = []
        self._ids: list[Chain] = []
        self._prompt: list[int] = []
        self._child: dict[int, int] = {}
        self._unused: list[int] = []
        self._freed: list[int] = []
        self._on_free = on_free

    def root(self, prompt_ids: Sequence[int]) -> int:
        """Make the node at the end of a prompt. The caller counts on it."""
        ids = Chain(np.array(prompt_ids, dtype=np.int64), len(prompt_ids))
        return self._new(NONE, prompt_ids[-1], 0, ids, len(prompt_ids))

    def child(self, parent: int, token: int) -> int | None:
        """Find the child of `parent` by its token."""
        return self._child.get(parent << 32 | token)

    def grow(self, parent: int, token: int) -> int:
        """Make a new child; there must be none of that token. The caller counts on it."""
        length = self.length[parent] + 1
        prompt = self._prompt[parent]
        ids = self._ids[parent].extended(prompt + length - 1, token)
        node = self._new(parent, token, length, ids, prompt)
        self._child[parent << 32 | token] = node
        self._count[parent] += 1
        return node

    def hold(self, node: int) -> None:
        """Count on a node."""
        self._count[node] += 1

    def release(self, node: int) -> None:
        """Count on a node no longer, and free all that nothing counts on any more."""
        count = self._count
        count[node] -= 1
        while node != NONE and count[node] == 0:
            parent = self.parent[node]
            self._free(node)
            node = parent
            if node != NONE:
                count[node] -= 1

    def path(self, node: int) -> NDArray[np.int64]:
        """Give the token ids from the start of the prompt to the node (a view: do not write to it)."""
        return self._ids[node].array[: self._prompt[node] + self.length[node]]

    def new_tokens(self, node: int) -> tuple[int, ...]:
        """Give the token ids after the prompt."""
        prompt = self._prompt[node]
        return tuple(self._ids[node].array[prompt : prompt + self.length[node]].tolist())

    def path_length(self, node: int) -> int:
        """Count the tokens of the path, prompt included."""
        return self._prompt[node] + self.length[node]

    def recycle(self) -> None:
        """Let the numbers of freed nodes be given again (never within a step: readings go by them)."""
        self._unused += self._freed
        self._freed.clear()

    def __len__(self) -> int:
        return len(self.parent) - len(self._unused) - len(self._freed)

    def _new(self, parent: int, token: int, length: int, ids: Chain, prompt: int) -> int:
        if self._unused:
            node = self._unused.pop()
            self.parent[node], self.token[node], self.length[node] = parent, token, length
            self._ids[node], self._prompt[node], self._count[node] = ids, prompt, 1
            return node
        self.parent.append(parent)
        self.token.append(token)
        self.length.append(length)
        self._ids.append(ids)
        self._prompt.append(prompt)
        self._count.append(1)
        self.states.append(())
        self.text.append(None)
        return len(self.parent) - 1

    def _free(self, node: int) -> None:
        parent, ids = self.parent[node], self._ids[node]
        at = self._prompt[node] + self.length[node] - 1
        if parent != NONE:
            del self._child[parent << 32 | self.token[node]]
            ids.shortened(at)
        self.states[node], self.text[node] = (), None
        self._on_free(node)
        self._freed.append(node)
