"""Stop strings: the text of a path, folded token by token like any other state, and searched as it grows."""

from __future__ import annotations

from typing import Any

from unspool.live import Live
from unspool.text import Detokenizer, StopStrings
from unspool.tree import Tree


class StopText:
    """Finds stop strings along the paths of the tree.

    Args:
        tree: whose nodes keep the text's state.
        detokenizer: turns tokens into text; None where a model has no tokenizer (then no text is ever found).
    """

    def __init__(self, tree: Tree, detokenizer: Detokenizer | None) -> None:
        self._tree, self._detokenizer = tree, detokenizer
        self._scanners: dict[tuple[str, ...], StopStrings] = {}

    def ends(self, live: Live, node: int, token: int) -> bool:
        """Tell whether the text of a path ends in a stop string (or holds one) once `token` follows `node`."""
        if self._detokenizer is None:
            return False
        found: bool = self._after(live, self._state(live, node), token)[2]
        return found

    def _state(self, live: Live, node: int) -> Any:
        chain = []
        while self._tree.text[node] is None and node != live.root:
            chain.append(node)
            node = self._tree.parent[node]
        if self._tree.text[node] is None:
            assert self._detokenizer is not None
            start = self._detokenizer.start(live.request.prompt_ids), self._scanner(live).start()
            self._tree.text[node] = (*start, False)
        for node in reversed(chain):
            before = self._tree.text[self._tree.parent[node]]
            self._tree.text[node] = self._after(live, before, self._tree.token[node])
        return self._tree.text[chain[0] if chain else node]

    def _after(self, live: Live, state: Any, token: int) -> Any:
        assert self._detokenizer is not None
        text, scan, _ = state
        text, piece = self._detokenizer.push(text, token)
        scan, found = self._scanner(live).push(scan, piece)
        return text, scan, found is not None

    def _scanner(self, live: Live) -> StopStrings:
        stops = live.request.limits.stop
        if stops not in self._scanners:
            self._scanners[stops] = StopStrings(stops)
        return self._scanners[stops]
