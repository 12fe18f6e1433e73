"""The table of a pass: all that the attention kernel is told of it, as one flat list of whole numbers.

    head        how many parts; where parts, rows, stretches and slots begin in the list
    parts       each 6: first row, rows, first stretch, stretches, length of the context, first byte of its mask (or -1)
    rows        each 3: the token in the batch, and the places of the context from which and before which it sees
    stretches   each 2: first slot, length
    slots       where each token's keys and values go

A span is one part. Chains whose contexts begin with the same stretch of slots share it: that is a part of its own, read
once for all their tokens, and what follows it is each span's own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.huggingface.attention import Call
from unspool.huggingface.pool import Pool
from unspool.runner import Batch, Span

_WORTH_SHARING = 64
"""Slots that a common beginning must have to be read apart."""
_HEAD = 6
"""Numbers before the parts."""
_NO_MASK = torch.zeros(2, dtype=torch.uint8)
Stretches = list[tuple[int, int]]


class Table(NamedTuple):
    """One pass as the kernel reads it.

    Args:
        numbers: `[size]` int64.
        mask: `[bytes]` uint8, 1 where a row sees a place of its context.
    """

    numbers: Tensor
    mask: Tensor


class TablePlan:
    """One pass over a pool, by the kernel. Each layer attends in turn.

    Args:
        pool: where keys and values are kept.
        batch: what runs.
    """

    def __init__(self, pool: Pool, batch: Batch) -> None:
        pool.positions[batch.slots] = batch.positions
        self._pool, self._batch, self._turn = pool, batch, 0
        self._tables: dict[int | None, Table] = {}

    def attend(self, call: Call) -> Tensor:
        """Write the next layer's keys and values, then attend, giving `[1, n, heads, value width]`."""
        group, row = self._pool.places[self._turn]
        self._turn += 1
        table = self.table(group.layer.window)
        return attend_by_kernel(call, group.row_keys[row], group.row_values[row], table)

    def table(self, window: int | None) -> Table:
        """Give the table of the layers with a window."""
        if window not in self._tables:
            self._tables[window] = _Writer(self._pool, self._batch, window).table()
        return self._tables[window]


def attend_by_kernel(call: Call, keys: Tensor, values: Tensor, table: Table) -> Tensor:
    """Attend by the kernel over one layer's keys and values `[1, kv heads, slots, width]`."""
    get = call.settings.get
    scaling, softcap, sinks = get("scaling"), get("softcap"), get("s_aux")
    scaling = call.query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attended: Tensor = torch.ops.unspool.attend(
        call.query, call.key, call.value, keys, values, *table, sinks, None, None, scaling, softcap or 0.0
    )
    return attended


class _Writer:
    """Writes the table of one pass for layers of one window, in lists: arrays as short as most of these cost more."""

    def __init__(self, pool: Pool, batch: Batch, window: int | None) -> None:
        self._pool, self._batch, self._window = pool, batch, window
        self._parts: list[int] = []
        self._rows: list[int] = []
        self._stretches: list[int] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._mask_bytes = 0

    def table(self) -> Table:
        chains = [span for span in self._batch.spans if span.mask is None]
        contexts = [stretches(span.context) for span in chains]
        if shared := self._shared(chains, contexts):
            contexts = [_without(context, shared.get(context[0][0], 0)) for context in contexts]
        for span, context in zip(chains, contexts, strict=True):
            self._chain(span, context)
        for span in self._batch.spans:
            if span.mask is not None:
                self._tree(span, span.mask)
        rows = _HEAD + len(self._parts)
        places = rows, rows + len(self._rows), rows + len(self._rows) + len(self._stretches)
        head = len(self._parts) // 6, _HEAD, *places, 0
        slots = self._batch.slots.tolist()
        numbers = np.array([*head, *self._parts, *self._rows, *self._stretches, *slots], dtype=np.int64)
        mask = torch.from_numpy(np.concatenate(self._masks).view(np.uint8)) if self._masks else _NO_MASK
        return Table(torch.from_numpy(numbers), mask if len(mask) > 1 else mask.repeat(2))

    def _shared(self, chains: Sequence[Span], contexts: Sequence[Stretches]) -> dict[int, int]:
        """Write a part for each beginning that several chains share, and give those: first slot -> length."""
        if self._window is not None or len({context[0][0] for context in contexts}) == len(contexts):
            return {}
        by_slot: dict[int, list[int]] = {}
        for number, context in enumerate(contexts):
            by_slot.setdefault(context[0][0], []).append(number)
        shared = {}
        for first, numbers in by_slot.items():
            # The first token of a chain must see all of it, and something must be left to each.
            length = min(min(contexts[i][0][1], chains[i].context_length - chains[i].count) for i in numbers)
            if len(numbers) > 1 and length >= _WORTH_SHARING:
                tokens = [token for i in numbers for token in _tokens(chains[i])]
                self._part(len(tokens), [(first, length)], length)
                for token in tokens:
                    self._rows += (token, 0, length)
                shared[first] = length
        return shared

    def _chain(self, span: Span, context: Stretches) -> None:
        length = sum(count for _, count in context)
        self._part(span.count, context, length)
        for token, end in zip(_tokens(span), range(length - span.count + 1, length + 1), strict=True):
            self._rows += (token, 0 if self._window is None else max(end - self._window, 0), end)

    def _tree(self, span: Span, seen: NDArray[np.bool_]) -> None:
        context = span.context
        if self._pool.spoilt or not isinstance(context, slice):
            slots = np.arange(context.start, context.stop) if isinstance(context, slice) else context
            used = seen.any(axis=0)  # what nobody sees may be NaN, and NaN times nothing is NaN
            context, seen = slots[used], seen[:, used]
        if self._window is not None:
            own = self._batch.positions[span.start : span.start + span.count]
            seen = seen & (own[:, None] - self._pool.positions[context][None, :] < self._window)
        length = seen.shape[1]
        self._part(span.count, stretches(context), length, self._mask_bytes)
        for token in _tokens(span):
            self._rows += (token, 0, length)
        self._masks.append(np.ascontiguousarray(seen).ravel())
        self._mask_bytes += seen.size

    def _part(self, rows: int, context: Stretches, length: int, mask: int = -1) -> None:
        """Write a part. Its rows follow."""
        self._parts += (len(self._rows) // 3, rows, len(self._stretches) // 2, len(context), length, mask)
        for stretch in context:
            self._stretches += stretch


def _tokens(span: Span) -> range:
    return range(span.start, span.start + span.count)


def stretches(context: slice | NDArray[np.int64]) -> Stretches:
    """Give a context as stretches (first slot, length)."""
    if isinstance(context, slice):
        return [(context.start, context.stop - context.start)]
    breaks = np.flatnonzero(np.diff(context) != 1) + 1
    starts = [0, *breaks.tolist()]
    lengths = np.diff([*starts, len(context)]).tolist()
    return list(zip(context[starts].tolist(), lengths, strict=True))


def _without(context: Stretches, length: int) -> Stretches:
    """Leave out so many slots of the first stretch."""
    (first, whole), *others = context
    return [(first + length, whole - length), *others] if whole > length else others
