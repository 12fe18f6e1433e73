"""An exact language model: explicit conditional distributions behind a cache that notices every mistake.

What follows a path is a pure function of its tokens, in float64, so laws about it are equalities. The model reaches a
token's path only through the slots that its span may see, as a real one does. A slot remembers which token was run in
it, where, and after what; so a wrong slot, a stale one, a hole, a neighbour that leaks in or a mask that is off by one
raises a `CacheError` instead of shifting a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.runner import Batch, Output, Span

Path = tuple[int, ...]
Table = Mapping[Path, Sequence[float]]
"""Endings of paths -> the logits that follow; the longest ending that is named counts, `()` is the last resort."""

_UNWRITTEN = -1


class CacheError(AssertionError):
    """A pass that would have given wrong numbers: the message says which slot, and what is wrong with it."""


class TableModel:
    """A model whose every distribution is known.

    Hidden states have the width of the vocabulary and the head is the identity, so the hidden state of the last layer
    is the logits, and that of an earlier layer is what a companion of so many layers says. Layer 0 knows the last token
    only; the layers between know the whole path.

    Args:
        vocab_size: 1 to 64.
        seed: chooses the distributions.
        table: explicit logits; where no ending fits, or without a table, they are hashed from the path.
        memory: how many last tokens the hash looks at; None: the whole path, so that no two paths agree by chance.
        spread: hashed logits lie in (-spread, spread).
        layers: how many layers it has.
        window: most positions; None: no limit.
    """

    def __init__(
        self,
        vocab_size: int = 5,
        seed: int = 0,
        *,
        table: Table | None = None,
        memory: int | None = None,
        spread: float = 2.0,
        layers: int = 3,
        window: int | None = None,
    ) -> None:
        if not 1 <= vocab_size <= 64:
            raise ValueError(f"a table has a vocabulary of 1 to 64 tokens, not {vocab_size}")
        self.vocab_size = self.width = vocab_size
        self.seed, self.table, self.memory, self.spread = seed, table, memory, spread
        self.layers, self.window = layers, window
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.passes = 0
        """Passes that were run."""
        self.tokens = 0
        """Tokens that were run, in all passes."""
        self.paths: list[tuple[int, Path]] = []
        """Each token that was run, as the layers that it went through and the path that it ended."""
        self._known: dict[tuple[Path, int], Tensor] = {}
        self._slots = _Slots(0)

    # ---- the distributions ------------------------------------------------------------------------------------------

    def logits_after(self, path: Sequence[int], layers: int | None = None) -> Tensor:
        """Give the logits that follow a path, prompt included: `[vocab]` float64. `layers`: of the first so many."""
        return self.hidden_after(path, self.layers if layers is None else layers)

    def hidden_after(self, path: Sequence[int], layer: int) -> Tensor:
        """Give the hidden state of the last token of a path: `[width]` float64."""
        layer = self.layers if layer == -1 else layer
        path = tuple(path)
        if layer == self.layers and self.table is not None:
            for start in range(len(path) + 1):
                if (row := self.table.get(path[start:])) is not None:
                    return torch.tensor(row, dtype=torch.float64)
        ending = path[-1:] if layer == 0 else path if self.memory is None else path[max(0, len(path) - self.memory) :]
        known = self._known.get((ending, layer))
        if known is None:
            known = self._known[ending, layer] = self._hashed(ending, layer)
        return known

    def _hashed(self, ending: Path, layer: int) -> Tensor:
        digest = b""
        while len(digest) < 8 * self.vocab_size:
            text = f"{self.seed}/{layer}/{len(digest)}/{ending}"
            digest += hashlib.blake2b(text.encode()).digest()
        uniform = np.frombuffer(digest, dtype=np.uint64)[: self.vocab_size] / 2.0**64
        return torch.from_numpy(np.round(self.spread * (2 * uniform - 1), 3))  # so that a table of them is exact

    def rows(self) -> dict[Path, list[float]]:
        """List what was asked of the whole model so far: endings of paths -> the logits that follow."""
        asked = {ending: row.tolist() for (ending, layer), row in self._known.items() if layer == self.layers}
        return {ending: asked[ending] for ending in sorted(asked, key=lambda path: (len(path), path))}

    # ---- the runner -------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Name the distributions."""
        return f"table-{self.vocab_size}-{self.seed}"

    def slot_bytes(self) -> int:
        """Say what a slot takes."""
        return 32

    def free_bytes(self) -> int:
        """Say what is free: enough."""
        return 1 << 24

    def allocate(self, slots: int) -> None:
        """Make a pool of slots that nobody has written to."""
        self._slots = _Slots(slots)

    def poison(self, slots: Iterable[int] | NDArray[np.int64]) -> None:
        """Forget what free slots hold, so that whoever reads one is caught."""
        self._slots.position[slots if isinstance(slots, np.ndarray) else list(slots)] = _UNWRITTEN

    def forward(self, batch: Batch) -> Output:
        """Run one packed pass. Raise a `CacheError` where a token does not see exactly its own path."""
        self.passes += 1
        self.tokens += len(batch.token_ids)
        depth = self.layers if batch.layers is None else batch.layers
        _check_batch(batch, self._slots.size)
        self._slots.begin(batch, depth)
        paths: list[Path] = [()] * len(batch.token_ids)
        for index, visible, chain in sorted(_sights(batch), key=lambda sight: int(batch.positions[sight[0]])):
            paths[index] = self._slots.enter(int(batch.slots[index]), visible, depth, chain)
        if any(not 0 <= token < self.vocab_size for token in batch.token_ids.tolist()):
            raise CacheError(f"token ids {batch.token_ids.tolist()} outside a vocabulary of {self.vocab_size}")
        if any(not -1 <= layer <= depth for layer in batch.hidden):
            raise CacheError(f"hidden states of layers {list(batch.hidden)} in a pass of {depth} layers")
        self.paths += [(depth, path) for path in paths]
        wanted = [self.logits_after(paths[index], depth) for index in batch.wanted.tolist()]
        hidden = {
            layer: self._stacked([self.hidden_after(path, depth if layer == -1 else layer) for path in paths])
            for layer in batch.hidden
        }
        return Output(self._stacked(wanted), hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the head, which is the identity: `[n, width]` -> `[n, vocab]`."""
        return hidden.clone()

    def _stacked(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows)) if rows else torch.empty((0, self.vocab_size), dtype=self.dtype)


class _Slots:
    """The cache: for each slot the token that was run in it, its position, the layers, and a hash of its whole path."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.token = np.zeros(size, dtype=np.int64)
        self.position = np.full(size, _UNWRITTEN, dtype=np.int64)
        self.depth = np.zeros(size, dtype=np.int64)
        self.path_hash = np.zeros(size, dtype=np.int64)
        self.parent_hash = np.zeros(size, dtype=np.int64)

    def begin(self, batch: Batch, depth: int) -> None:
        """Write all tokens of a pass: they may see each other."""
        self.token[batch.slots] = batch.token_ids
        self.position[batch.slots] = batch.positions
        self.depth[batch.slots] = depth
        self.path_hash[batch.slots] = 0

    def enter(self, slot: int, visible: NDArray[np.int64], depth: int, chain: bool) -> Path:
        """Check what the token in `slot` sees, a chain in the order of its path, and give its path.

        Tokens at earlier positions were entered before.
        """
        positions = self.position[visible]
        order = np.argsort(positions, kind="stable")
        visible, positions = visible[order], positions[order]
        here = f"slot {slot} (token {self.token[slot]} at position {self.position[slot]})"
        if len(positions) and positions[0] == _UNWRITTEN:
            raise CacheError(f"{here} sees slot {visible[0]}, which holds nothing: it was freed, or never written")
        if not np.array_equal(positions, np.arange(self.position[slot] + 1)):
            raise CacheError(f"{here} must see each position up to its own once, and sees {positions.tolist()}")
        if chain and not np.array_equal(order, np.arange(len(order))):
            raise CacheError(f"{here} is in a chain, whose context must stand in the order of its path")
        if visible[-1] != slot:
            raise CacheError(f"{here} sees slot {visible[-1]} at its own position")
        if (self.depth[visible] != depth).any():
            raise CacheError(f"{here} runs {depth} layers and sees slots of {self.depth[visible].tolist()} layers")
        before = self.path_hash[visible[:-1]]
        links = np.concatenate([[0], before[:-1]]) if len(before) else before
        if (self.parent_hash[visible[:-1]] != links).any():
            wrong = int(np.flatnonzero(self.parent_hash[visible[:-1]] != links)[0])
            raise CacheError(f"{here} sees slot {visible[wrong]} at position {wrong}, which was run after another path")
        path = tuple(self.token[visible].tolist())
        self.parent_hash[slot] = before[-1] if len(before) else 0
        self.path_hash[slot] = hash(path) or 1
        return path


def _check_batch(batch: Batch, size: int) -> None:
    count = len(batch.token_ids)
    if not count:
        raise CacheError("a pass without a token")
    if len(batch.positions) != count or len(batch.slots) != count:
        raise CacheError("tokens, positions and slots of different lengths")
    if len(np.unique(batch.slots)) != count:
        raise CacheError(f"a slot is written twice in one pass: {sorted(batch.slots.tolist())}")
    if batch.slots.min() < 0 or batch.slots.max() >= size:
        raise CacheError(f"slots {batch.slots.tolist()} outside a pool of {size}")
    if (np.diff(batch.wanted) <= 0).any() or (
        len(batch.wanted) and not 0 <= batch.wanted[0] <= batch.wanted[-1] < count
    ):
        raise CacheError(f"wanted must ascend within the batch: {batch.wanted.tolist()}")
    at = 0
    for span in batch.spans:
        if span.start != at or span.count < 1:
            raise CacheError(f"spans must cover the batch in order: {span} comes at {at}")
        at += span.count
    if at != count:
        raise CacheError(f"spans cover {at} of {count} tokens")


def _sights(batch: Batch) -> list[tuple[int, NDArray[np.int64], bool]]:
    """List each token's index in the batch with the slots that it sees, and whether they are those of a chain."""
    sights: list[tuple[int, NDArray[np.int64], bool]] = []
    for span in batch.spans:
        slots = batch.slots[span.start : span.start + span.count]
        context = _context(span)
        if len(np.unique(context)) != len(context):
            raise CacheError(f"a context names a slot twice: {context.tolist()}")
        if span.mask is None:
            if not np.array_equal(context[len(context) - span.count :], slots):
                raise CacheError(f"a chain's context {context.tolist()} must end in its own slots {slots.tolist()}")
            seen = [context[: len(context) - span.count + i + 1] for i in range(span.count)]
        else:
            if span.mask.shape != (span.count, len(context)):
                raise CacheError(f"a mask of {span.mask.shape} for {span.count} tokens and {len(context)} slots")
            seen = [context[row] for row in span.mask]
        sights += [(span.start + i, visible, span.mask is None) for i, visible in enumerate(seen)]
    return sights


def _context(span: Span) -> NDArray[np.int64]:
    if isinstance(span.context, slice):
        return np.arange(span.context.start, span.context.stop, dtype=np.int64)
    return span.context
