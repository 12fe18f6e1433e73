"""The plan of one pass: where each layer writes its keys and values, and what each span then reads.

All that is the same in every layer (views, masks, indices) is made once, when the first layer of its kind asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unspool.huggingface.attention import Call
from unspool.huggingface.pool import Group, Pool
from unspool.runner import Batch, Span

# On a CPU a call costs about as much as copying a context of so many bytes; longer contexts are read where they are.
_WORTH_COPYING = 320 * 1024
_FEWEST_TOGETHER = 4
# A key that several tokens and heads share is read once for so many of them: beyond it, heads go side by side.
_FEW_ROWS = 64


class Plan:
    """One pass over a pool. Each layer attends in turn.

    Args:
        pool: where keys and values are kept.
        batch: what runs.
    """

    def __init__(self, pool: Pool, batch: Batch) -> None:
        pool.positions[batch.slots] = batch.positions
        self._pool, self._batch = pool, batch
        self._turn = 0
        self._shares: dict[Group, _Share] = {}

    def attend(self, call: Call) -> Tensor:
        """Write the next layer's keys and values, then attend, giving `[1, n, heads, value width]`."""
        group, row = self._pool.places[self._turn]
        self._turn += 1
        share = self._shares.get(group)
        if share is None:
            share = self._shares[group] = _Share(group, self._pool, self._batch, call.query.shape[1])
        share.write(row, call.key, call.value)
        get = call.settings.get
        return share.attend(row, _Queries(group, call.query, get("scaling"), get("softcap"), get("s_aux")))


class _Queries:
    """One layer's queries and how they score keys.

    The heads of a group share one key head. They are shown in two ways, so that no key is ever repeated: as rows of one
    product, where a span has few tokens; as heads over an expanded view of their keys, where it has many.
    """

    __slots__ = ("by_head", "by_token", "scaling", "shape", "sinks", "softcap")

    def __init__(
        self, group: Group, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
    ) -> None:
        _, heads, tokens, width = query.shape
        self.shape = (1, tokens, heads, group.layer.value_width)
        self.by_head = query.view(group.layer.kv_heads, heads // group.layer.kv_heads, tokens, width)
        self.by_token = self.by_head.permute(2, 0, 1, 3)  # [n, kv heads, group, width]
        self.scaling = width**-0.5 if scaling is None else scaling
        self.softcap, self.sinks = softcap, sinks

    def of_many(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend `[m, kv heads, group, width]` queries to keys `[m, kv heads, length, width]` of their own."""
        if self.softcap is None and self.sinks is None:
            return scaled_dot_product_attention(queries, keys, values, mask, scale=self.scaling)
        sinks = None if self.sinks is None else self.sinks.view(1, *self.by_token.shape[1:3], 1)
        return self._scored(queries, keys, values, mask, sinks)

    def of_span(self, tokens: range, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend tokens that share one context, `[1, kv heads, length, width]`.

        Without a mask, one token sees all of it, and several tokens are the context, each seeing those up to itself. A
        mask that stands there once for each head of a group asks for the heads as rows of one product.
        """
        if len(tokens) == 1:
            return self.of_many(self.by_token.narrow(0, tokens.start, 1), keys, values, mask)
        group = self.by_head.shape[1]
        queries = self.by_head.narrow(2, tokens.start, len(tokens))
        if mask is not None and len(mask) == group * len(tokens):
            if self.softcap is None and self.sinks is None:
                flat = queries.reshape(1, len(queries), -1, queries.shape[3])
                output = scaled_dot_product_attention(flat, keys, values, mask, scale=self.scaling)
                return output.view(*queries.shape[:3], -1).permute(2, 0, 1, 3)
            mask = mask[: len(tokens)]
        shape = (-1, group, -1, -1)
        keys, values = keys[0].unsqueeze(1).expand(shape), values[0].unsqueeze(1).expand(shape)
        if self.softcap is None and self.sinks is None:
            causal = mask is None
            output = scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=self.scaling)
        else:
            sinks = None if self.sinks is None else self.sinks.view(*self.by_head.shape[:2], 1, 1)
            if mask is None:
                mask = queries.new_full((len(tokens), len(tokens)), float("-inf")).triu_(1)
            output = self._scored(queries, keys, values, mask, sinks)
        return output.permute(2, 0, 1, 3)

    def _scored(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """Attend by hand, with a soft cap on the scores or a sink a head: what fused attention does not offer."""
        scores = torch.matmul(queries, keys.transpose(-1, -2)) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
        if sinks is not None:  # one more score, which takes its share of the weight and gives nothing
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        precise = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = torch.softmax(scores, dim=-1, dtype=precise).to(values.dtype)
        return torch.matmul(weights if sinks is None else weights[..., :-1], values)


class _Read(Protocol):
    """How some of the batch's tokens read their contexts, the same in all layers of a group."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens that it answers for, in the order of its answer."""
        ...

    def attend(self, group: Group, row: int, queries: _Queries) -> Tensor:
        """Give `[tokens, kv heads, group, value width]`."""
        ...


@dataclass(slots=True)
class _View:
    """One span whose context is consecutive: read where it lies."""

    tokens: range
    keys: Sequence[Tensor]  # row -> [1, kv heads, length, width]
    values: Sequence[Tensor]
    mask: Tensor | None  # [count, length], added to the scores

    def attend(self, group: Group, row: int, queries: _Queries) -> Tensor:
        del group  # the views were made from it
        return queries.of_span(self.tokens, self.keys[row], self.values[row], self.mask)


@dataclass(slots=True)
class _Pick:
    """One span whose context is scattered: copied together, then read."""

    tokens: range
    index: Tensor  # [kv heads * length] into the flat list of heads and slots
    mask: Tensor | None  # [count, length], added to the scores

    def attend(self, group: Group, row: int, queries: _Queries) -> Tensor:
        return queries.of_span(self.tokens, *_picked(group, row, self.index, 1), self.mask)


@dataclass(slots=True)
class _Gather:
    """Several spans of one token with contexts of like length: copied together, then read in one call.

    A shorter context is padded with its own last slot, so that nothing of another request is ever touched.
    """

    tokens: list[int]
    rows: Tensor  # [m] the same
    index: Tensor  # [m * kv heads * length] into the flat list of heads and slots
    mask: Tensor | None  # [m, 1, 1, length], added to the scores

    def attend(self, group: Group, row: int, queries: _Queries) -> Tensor:
        keys, values = _picked(group, row, self.index, len(self.tokens))
        return queries.of_many(queries.by_token.index_select(0, self.rows), keys, values, self.mask)


def _picked(group: Group, row: int, index: Tensor, contexts: int) -> tuple[Tensor, Tensor]:
    shape = (contexts, group.layer.kv_heads, len(index) // (contexts * group.layer.kv_heads), -1)
    keys = group.flat_keys[row].index_select(0, index).view(shape)
    return keys, group.flat_values[row].index_select(0, index).view(shape)


class _Share:
    """What a pass does in the layers of one group."""

    def __init__(self, group: Group, pool: Pool, batch: Batch, heads: int) -> None:
        self._group, self._pool, self._batch = group, pool, batch
        self._heads = heads // group.layer.kv_heads
        first, count = int(batch.slots[0]), len(batch.slots)
        self._slots: Tensor | None = None
        if np.array_equal(batch.slots, np.arange(first, first + count)):
            self._keys = group.keys.narrow(3, first, count).unbind(0)
            self._values = group.values.narrow(3, first, count).unbind(0)
        else:
            self._slots = self._tensor(batch.slots)
        self._reads = list(self._planned())
        order = [token for read in self._reads for token in read.tokens]
        self._restore = None if order == sorted(order) else self._tensor(np.argsort(np.array(order)))

    def write(self, row: int, key: Tensor, value: Tensor) -> None:
        """Keep the batch's own keys and values, `[1, kv heads, n, width]`, in its slots."""
        if self._slots is None:
            self._keys[row].copy_(key)
            self._values[row].copy_(value)
        else:
            self._group.row_keys[row].index_copy_(2, self._slots, key)
            self._group.row_values[row].index_copy_(2, self._slots, value)

    def attend(self, row: int, queries: _Queries) -> Tensor:
        """Attend every span to its context, giving `[1, n, heads, value width]`."""
        outputs = [read.attend(self._group, row, queries) for read in self._reads]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._restore is not None:
            output = output.index_select(0, self._restore)
        return output.reshape(queries.shape)

    def _planned(self) -> Iterator[_Read]:
        """Decide how each span is read: steps of like length together, if that pays, all others by themselves."""
        steps = []
        for span in self._batch.spans:
            if span.mask is None and span.count == 1 and self._pays(span):
                steps.append(span)
            else:
                yield self._alone(span)
        steps.sort(key=self._seen)
        while steps:
            most = self._seen(steps[0]) * 5 // 4 + 16
            alike = sum(self._seen(span) <= most for span in steps)
            if alike >= _FEWEST_TOGETHER:
                yield self._gather(steps[:alike])
            else:
                yield from map(self._alone, steps[:alike])
            del steps[:alike]

    def _pays(self, span: Span) -> bool:
        scattered = not isinstance(span.context, slice)
        short = self._seen(span) * self._group.layer.slot_bytes <= _WORTH_COPYING
        return scattered or short or self._pool.device.type != "cpu"

    def _seen(self, span: Span) -> int:
        """Count the slots that the last token of a chain sees."""
        window = self._group.layer.window
        return span.context_length if window is None else min(span.context_length, window)

    def _alone(self, span: Span) -> _View | _Pick:
        length, window, context = span.context_length, self._group.layer.window, span.context
        seen = span.mask
        if seen is not None and isinstance(context, slice) and self._pool.spoilt:
            used = seen.any(axis=0)  # what nobody sees may be NaN, and NaN times nothing is NaN
            context, seen = np.flatnonzero(used) + context.start, seen[:, used]
        if seen is not None and window is not None:
            own = self._batch.positions[span.start : span.start + span.count]
            seen = seen & (own[:, None] - self._pool.positions[context][None, :] < window)
        elif seen is None:
            first = length - min(length, self._seen(span) + span.count - 1)  # the first that any of its tokens sees
            context = cut(context, first)
            if span.count > 1 and (length > span.count or span.count > self._seen(span)):
                seen = _chain(span.count, length - first, window)
        if seen is not None and span.mask is not None and span.count * self._heads <= _FEW_ROWS:
            seen = np.tile(seen, (self._heads, 1))
        mask = None if seen is None else self._mask(seen)
        tokens = range(span.start, span.start + span.count)
        if not isinstance(context, slice):
            return _Pick(tokens, self._flat(context), mask)
        count = context.stop - context.start
        keys = self._group.keys.narrow(3, context.start, count).unbind(0)
        return _View(tokens, keys, self._group.values.narrow(3, context.start, count).unbind(0), mask)

    def _gather(self, spans: Sequence[Span]) -> _Gather:
        lengths = np.array([self._seen(span) for span in spans])
        longest = int(lengths[-1])
        contexts = np.empty((len(spans), longest), dtype=np.int64)
        for row, span in zip(contexts, spans, strict=True):
            length = self._seen(span)
            context = cut(span.context, span.context_length - length)
            row[:length] = np.arange(context.start, context.stop) if isinstance(context, slice) else context
            row[length:] = row[length - 1]
        seen = np.arange(longest)[None, :] < lengths[:, None]
        mask = None if seen.all() else self._mask(seen)[:, None, None, :]
        tokens = [span.start for span in spans]
        return _Gather(tokens, self._tensor(np.array(tokens)), self._flat(contexts), mask)

    def _flat(self, contexts: NDArray[np.int64]) -> Tensor:
        """Turn slots `[..., length]` into places `[... * kv heads * length]` in the flat list of heads and slots."""
        heads = np.arange(self._group.layer.kv_heads)[:, None] * self._group.slots
        return self._tensor((contexts[..., None, :] + heads).ravel())

    def _mask(self, seen: NDArray[np.bool_]) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._group.layer.dtype, device=self._pool.device)
        return mask.masked_fill_(self._tensor(~seen), float("-inf"))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array, device=self._pool.device)


def cut(context: slice | NDArray[np.int64], first: int) -> slice | NDArray[np.int64]:
    """Leave out so many slots at the beginning of a context."""
    if isinstance(context, slice):
        return slice(context.start + first, context.stop)
    return context[first:]


def _chain(count: int, length: int, window: int | None) -> NDArray[np.bool_]:
    """Say which of `length` slots in path order each of the last `count` tokens sees: `[count, length]`."""
    behind = np.arange(length - count, length)[:, None] - np.arange(length)[None, :]
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)
