"""Attention for GPUs: torch's FlexAttention over the pool's keys and values where they lie.

FlexAttention reads keys by blocks of consecutive slots, and asks a function whether a row sees a slot. Rows stand in
*tiles* that share a list of blocks: a tile for each single row, and larger ones for the pieces of a prompt. What a row
sees of its blocks is one bit a slot, so any path of any tree is a list of numbers, and all of a pass's numbers reach
the device in one copy.

A block holds slots of others too, and a weight of zero times NaN is NaN. So no value that is not finite is ever stored:
its token's key becomes NaN instead, and spoils those who see it and nobody else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from unspool.huggingface import kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.plan import cut
from unspool.huggingface.pool import Group, Layer, Pool
from unspool.huggingface.table import stretches
from unspool.runner import Batch, Span

BLOCK = 128
"""Slots of a block, and rows of a large tile."""
_WORD = 64
_FEW_ROWS = 16
"""Spans of so many rows are read row by row: a large tile would be mostly empty."""
_LEAST_WIDTH = 16
_MOST_SHAPES = 64
"""Compiled forms of attention that are kept: one for each number of tiles, each width, cap and scale."""


def refusal(layers: Sequence[Layer]) -> str | None:
    """Say why a GPU cannot attend this way in some layer; None: it can."""
    for layer in layers:
        if layer.dtype not in kernel.DTYPES:
            return f"FlexAttention does not compute in {layer.dtype}"
        if min(layer.key_width, layer.value_width) < _LEAST_WIDTH:
            return f"FlexAttention needs heads of at least {_LEAST_WIDTH} numbers"
    return None


def room(slots: int) -> int:
    """Give the size of a pool of whole blocks, with a slot at its end that nobody owns: padded rows may write there."""
    return -(-(slots + 1) // BLOCK) * BLOCK


def sent(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Copy whole numbers to a device, all in one go and without waiting for it."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = torch.split(flat, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Marks(NamedTuple):
    """What some tiles see of the pool, in whole numbers.

    Args:
        counts: `[tiles]` how many blocks of slots each reads.
        entries: `[m, 3 + 2 * rows]` one of them each: the tile, the how manieth of its blocks this is, the block, and
            for each row of the tile the two words of its bits.
    """

    counts: NDArray[np.int64]
    entries: NDArray[np.int64]


class Sight:
    """What some tiles see of the pool, as FlexAttention is told, on the device. It changes by `show` alone.

    Args:
        tiles: how many.
        rows: of each.
        slots: of the pool.
        device: where it lives.
    """

    def __init__(self, tiles: int, rows: int, slots: int, device: torch.device) -> None:
        blocks = -(-slots // BLOCK)
        self.counts = torch.zeros(tiles, 1, 1, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(tiles, 1, 1, blocks, dtype=torch.int32, device=device)
        self.bits = torch.zeros(tiles, rows, blocks * BLOCK // _WORD, dtype=torch.int64, device=device)

    def show(self, counts: Tensor, entries: Tensor) -> None:
        """Show what `Marks` say, in place."""
        tile, place, block = entries[:, :3].unbind(1)
        rows = self.bits.shape[1]
        self.counts.copy_(counts.view(-1, 1, 1))
        self.blocks[tile, 0, 0, place] = block.to(torch.int32)
        self.bits.zero_()
        words = self.bits.view(len(counts), rows, -1, BLOCK // _WORD)
        words[tile, :, block] = entries[:, 3:].reshape(-1, rows, BLOCK // _WORD)


class Read(NamedTuple):
    """Rows of a pass that are read in tiles of one size.

    Args:
        tokens: `[tiles, rows]` the token in each place, any where there is none; None: the batch's own order.
        sights: window -> what the tiles see in layers of it.
    """

    tokens: Tensor | None
    sights: Mapping[int | None, Sight]

    def attend(self, call: Call, group: Group, row: int) -> Tensor:
        """Attend `[1, heads, n, width]` queries, giving `[tiles * rows, heads, value width]`."""
        sight, query = self.sights[group.layer.window], call.query[0]
        if self.tokens is not None:
            query = query.index_select(1, self.tokens.view(-1))
        tiles, rows, _ = sight.bits.shape
        query = query.view(len(query), tiles, rows, -1).transpose(0, 1)
        output = attention(query, group.row_keys[row], group.row_values[row], sight, call.settings)
        return output.transpose(1, 2).reshape(tiles * rows, len(query[0]), -1)


class FlexPlan:
    """One pass over a pool, by FlexAttention. Each layer attends in turn.

    Args:
        pool: where keys and values are kept.
        slots: `[n]` where each token's go.
        reads: who reads what.
        order: `[n]` where each token is in what the reads give together; None: in its place.
    """

    def __init__(self, pool: Pool, slots: Tensor, reads: Sequence[Read], order: Tensor | None = None) -> None:
        self._pool, self._slots, self._reads, self._order = pool, slots, reads, order
        self._turn = 0

    @classmethod
    def of(cls, pool: Pool, batch: Batch) -> FlexPlan:
        """Plan a batch, whatever it is."""
        pool.positions[batch.slots] = batch.positions
        few = [span for span in batch.spans if span.count <= _FEW_ROWS]
        many = [span for span in batch.spans if span.count > _FEW_ROWS]
        tilings = [_tiling(spans, rows) for spans, rows in ((few, 1), (many, BLOCK)) if spans]
        order = np.zeros(len(batch.slots), dtype=np.int64)
        places = np.concatenate([tiling.ravel() for tiling in tilings])
        order[places[places >= 0]] = np.flatnonzero(places >= 0)
        arrays, windows = [batch.slots, order, *(tiling.clip(0) for tiling in tilings)], pool.windows
        for window in windows:
            seen = runs(pool, batch, window)
            for tiling in tilings:
                arrays += marks(seen, tiling)
        slots, there, *tables = sent(arrays, pool.device)
        reads, tokens, tables = [], tables[: len(tilings)], tables[len(tilings) :]
        for number, tiling in enumerate(tilings):
            sights = {}
            for at, window in enumerate(windows):
                sights[window] = Sight(len(tiling), tiling.shape[1], len(pool.positions), pool.device)
                first = 2 * (at * len(tilings) + number)
                sights[window].show(*tables[first : first + 2])
            reads.append(Read(tokens[number], sights))
        return cls(pool, slots, reads, there)

    def attend(self, call: Call) -> Tensor:
        """Write the next layer's keys and values, then attend, giving `[1, n, heads, value width]`."""
        group, row = self._pool.places[self._turn]
        self._turn += 1
        spoilt = ~call.value.isfinite().all(-1, keepdim=True)
        group.row_keys[row].index_copy_(2, self._slots, call.key.masked_fill(spoilt, torch.nan))
        group.row_values[row].index_copy_(2, self._slots, call.value.masked_fill(spoilt, 0))
        outputs = [read.attend(call, group, row) for read in self._reads]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return (output if self._order is None else output.index_select(0, self._order))[None]


def attention(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, settings: Mapping[str, Any]) -> Tensor:
    """Attend `[tiles, heads, rows, width]` queries to a layer's keys and values, `[1, kv heads, slots, width]`.

    On a GPU it is compiled, once for each shape; elsewhere it is torch's plain form, which looks at every slot.
    """
    told = (sight.counts, sight.blocks, sight.bits)
    scoring = (settings.get("scaling"), settings.get("softcap"), settings.get("s_aux"))
    if query.device.type != "cuda":
        return _attention(query, keys, values, *told, *scoring)
    with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):  # beyond it torch would silently run the plain form
        return _compiled()(query, keys, values, *told, *scoring)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attention, dynamic=False)


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    blocks: Tensor,
    bits: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    def sees(tile: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return (bits[tile, row, slot // _WORD] >> (slot % _WORD)) & 1 == 1

    def capped(score: Tensor, _tile: Tensor, _head: Tensor, _row: Tensor, _slot: Tensor) -> Tensor:
        assert softcap is not None
        return torch.tanh(score / softcap) * softcap

    mask = BlockMask.from_kv_blocks(
        counts,
        blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(query.shape[2], keys.shape[2]),
        compute_q_blocks=False,
    )
    options: Any = {
        "score_mod": None if softcap is None else capped,
        "block_mask": mask,
        "scale": scaling,
        "enable_gqa": query.shape[1] != keys.shape[1],
    }
    if sinks is None:
        output: Tensor = flex_attention(query, keys, values, **options)
        return output
    # One more score, which takes its share of the weight and gives nothing.
    output, aux = flex_attention(query, keys, values, return_aux=AuxRequest(lse=True), **options)
    assert aux.lse is not None
    kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
    return output * kept[..., None].to(output.dtype)


def runs(pool: Pool, batch: Batch, window: int | None) -> NDArray[np.int64]:
    """Say what each token sees in layers of a window, `[m, 3]`: the token, and where a run of slots begins and ends."""
    alone: list[tuple[int, int, int]] = []
    found = []
    for span in batch.spans:
        if span.mask is not None:
            found.append(_of_tree(span, pool, batch, window))
        elif span.count == 1:
            unseen = 0 if window is None else max(span.context_length - window, 0)
            alone += [(span.start, at, at + length) for at, length in stretches(cut(span.context, unseen))]
        else:
            found.append(_of_chain(span, window))
    return np.concatenate([np.array(alone, dtype=np.int64).reshape(-1, 3), *found])


def _of_chain(span: Span, window: int | None) -> NDArray[np.int64]:
    """Cut the context's stretches for each token to what it sees."""
    starts, lengths = np.array(stretches(span.context)).T
    offsets = np.cumsum(lengths) - lengths
    high = np.arange(span.context_length - span.count, span.context_length)[:, None] + 1
    low = np.zeros_like(high) if window is None else high - window
    first = starts + np.clip(low - offsets, 0, lengths)
    last = starts + np.clip(high - offsets, 0, lengths)
    tokens = np.arange(span.start, span.start + span.count)[:, None]
    seen = first < last
    tokens = np.broadcast_to(tokens, seen.shape)
    return np.stack([tokens[seen], first[seen], last[seen]], axis=-1)


def _of_tree(span: Span, pool: Pool, batch: Batch, window: int | None) -> NDArray[np.int64]:
    """Join what each token sees into runs of consecutive slots."""
    seen, context = span.mask, span.context
    assert seen is not None
    if window is not None:
        own = batch.positions[span.start : span.start + span.count]
        seen = seen & (own[:, None] - pool.positions[context][None, :] < window)
    rows, places = np.nonzero(seen)
    slots = places + context.start if isinstance(context, slice) else context[places]
    ends = np.flatnonzero((np.diff(slots) != 1) | (np.diff(rows) != 0))
    first, last = np.append(0, ends + 1), np.append(ends, len(slots) - 1)
    return np.stack([rows[first] + span.start, slots[first], slots[last] + 1], axis=-1)


def marks(seen: NDArray[np.int64], tiling: NDArray[np.int64]) -> Marks:
    """Mark what tiles see.

    Args:
        seen: `[m, 3]`, as `runs` gives it.
        tiling: `[tiles, rows]` the token in each place; -1: none.
    """
    tiles, rows = tiling.shape
    place_of = np.full(int(seen[:, 0].max()) + 1, -1, dtype=np.int64)
    held = tiling.ravel()
    mine = (held >= 0) & (held < len(place_of))
    place_of[held[mine]] = np.flatnonzero(mine)
    places, first, last = place_of[seen[:, 0]], seen[:, 1], seen[:, 2]
    kept = places >= 0
    places, first, last = places[kept], first[kept], last[kept]
    # One word for each run and each 64 slots that it touches; then those of one tile and block are one entry.
    counts = (last - 1) // _WORD - first // _WORD + 1
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    word = np.repeat(first // _WORD, counts) + nth
    low = np.clip(np.repeat(first, counts) - word * _WORD, 0, _WORD - 1).astype(np.uint64)
    high = np.clip(word * _WORD + _WORD - np.repeat(last, counts), 0, _WORD - 1).astype(np.uint64)
    every = np.uint64(2**_WORD - 1)
    bits = (every << low) & (every >> high)
    place, most = np.repeat(places, counts), int(word.max(initial=0)) + 1
    keys, entry = np.unique(place // rows * most + word * _WORD // BLOCK, return_inverse=True)
    words = np.zeros((len(keys), rows, BLOCK // _WORD), dtype=np.uint64)
    np.bitwise_or.at(words, (entry, place % rows, word % (BLOCK // _WORD)), bits)
    tile = keys // most
    many = np.bincount(tile, minlength=tiles)
    nth = np.arange(len(keys)) - np.repeat(np.cumsum(many) - many, many)
    head = np.stack([tile, nth, keys % most], axis=-1)
    return Marks(many, np.concatenate([head, words.view(np.int64).reshape(len(keys), -1)], axis=1))


def _tiling(spans: Sequence[Span], rows: int) -> NDArray[np.int64]:
    """Put the tokens of spans into tiles `[tiles, rows]`, -1 where there is none; as many tiles as the next power of 2.

    Attention is compiled once for each number of tiles, so there must be few of them.
    """
    firsts = [first for span in spans for first in range(span.start, span.start + span.count, rows)]
    ends = [span.start + span.count for span in spans for _ in range(0, span.count, rows)]
    tiling = np.full((1 << (len(firsts) - 1).bit_length(), rows), -1, dtype=np.int64)
    tokens = np.array(firsts)[:, None] + np.arange(rows)
    tiling[: len(firsts)] = np.where(tokens < np.array(ends)[:, None], tokens, -1)
    return tiling
