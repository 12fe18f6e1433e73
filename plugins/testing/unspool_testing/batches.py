"""Random batches over a pool that holds something, to compare one way to attend with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from unspool.huggingface.attention import Attends, Call
from unspool.huggingface.pool import Layer, Pool
from unspool.runner import Batch, Span

_CPU = torch.device("cpu")


class RandomBatch:
    """A pool of one layer with something in it, and a batch over it: steps, pieces of prompts, trees, shared prefixes.

    Args:
        seed: gives the same batch again.
        layer: what the layer keeps and sees.
        heads: of its queries.
        settings: what else it hands to its attention (`scaling`, `softcap`, `s_aux`).
    """

    def __init__(self, seed: int, layer: Layer, heads: int, **settings: Any) -> None:
        self.random = np.random.default_rng(seed)
        self.layer, self.heads, self.settings = layer, heads, settings
        self.size = int(self.random.choice([400, 2500]))
        self.unused = self.random.permutation(self.size // 20) * 20  # stretches of 20 slots
        self.spans: list[Span] = []
        self.columns: list[list[NDArray[np.int64]]] = []
        self.tokens = 0
        shared = self._slots(self.size // 8)
        while self.tokens == 0 or (len(self.unused) > 1 and self.random.random() < 0.7):
            kind = self.random.choice(["step", "chunk", "tree", "sharer"])
            if kind == "tree":
                self._tree(int(self.random.integers(2, 40)))
            else:
                count = 1 if kind == "step" else int(self.random.integers(1, 60))
                own = self._slots(count + int(self.random.integers(0, self.size // 12)))
                self.chain(np.concatenate([shared, own]) if kind == "sharer" else own, min(count, len(own)))

    def clear(self, size: int) -> None:
        """Forget the batch, and take a pool of another size."""
        self.spans, self.columns, self.tokens, self.size = [], [], 0, size

    def chain(self, slots: NDArray[np.int64], count: int) -> None:
        """Add a chain of so many tokens, the last of a context."""
        consecutive = bool((np.diff(slots) == 1).all())
        context: Any = slice(int(slots[0]), int(slots[-1]) + 1) if consecutive else slots
        self.spans.append(Span(self.tokens, count, context))
        self._add(np.arange(len(slots) - count, len(slots)), slots[len(slots) - count :])

    def outputs(
        self, plan: Callable[[Pool, Batch], Attends], dtype: torch.dtype, device: torch.device = _CPU
    ) -> tuple[Tensor, Pool]:
        """Attend by a plan in a dtype, to the same numbers as in any other, and give the pool after it too."""
        generator = torch.Generator().manual_seed(0)

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.layer.dtype).to(device, dtype)

        pool = Pool([dataclasses.replace(self.layer, dtype=dtype)], self.size, device)
        (group, _), layer, n = pool.places[0], self.layer, self.tokens
        group.keys.copy_(some(*group.keys.shape))
        group.values.copy_(some(*group.values.shape))
        for span in self.spans:  # what lies before each token holds its own position
            pool.positions[span.context] = np.arange(span.context_length)
        positions, slots = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        batch = Batch(slots, positions, slots, self.spans, slots)
        query = some(1, n, self.heads, layer.key_width).transpose(1, 2)
        key, value = some(1, layer.kv_heads, n, layer.key_width), some(1, layer.kv_heads, n, layer.value_width)
        settings = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.settings.items()}
        return plan(pool, batch).attend(Call(nn.Module(), query, key, value, None, settings)), pool

    def _slots(self, count: int) -> NDArray[np.int64]:
        stretches, self.unused = np.split(self.unused, [min(len(self.unused), -(-count // 20))])
        if self.random.random() < 0.5:
            stretches = np.sort(stretches)
        return (stretches[:, None] + np.arange(20)).ravel()[: max(1, count)]

    def _tree(self, count: int) -> None:
        slots = self._slots(count + 30)
        count = min(count, len(slots) - 1)
        below = len(slots) - count
        mask = np.zeros((count, len(slots)), dtype=np.bool_)
        mask[:, :below] = True
        depth = np.zeros(count, dtype=np.int64)
        for node in range(count):
            parent = int(self.random.integers(-1, node))
            if parent >= 0:
                mask[node], depth[node] = mask[parent], depth[parent] + 1
            mask[node, below + node] = True
        context: Any = slots
        if (np.diff(slots) == 1).all():
            context = slice(int(slots[0]), int(slots[-1]) + 1)
        self.spans.append(Span(self.tokens, count, context, mask))
        self._add(below + depth, slots[below:])

    def _add(self, positions: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        self.columns.append([positions, slots])
        self.tokens += len(slots)


@st.composite
def random_batches(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> RandomBatch:
    """Draw batches over layers of every kind: heads that share keys, odd widths, windows, soft caps, sinks."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 8)]))
    widths = draw(st.sampled_from([(8, 8), (64, 64), (20, 12), (7, 5), (80, 48), (32, 96)]))
    window, dtype = draw(st.sampled_from([None, None, 1, 7, 100])), draw(st.sampled_from(dtypes))
    sinks = torch.linspace(-1, 2, kv_heads * group).to(dtype) if draw(st.booleans()) else None
    return RandomBatch(
        draw(st.integers(0, 10**9)),
        Layer(kv_heads, *widths, dtype, window),
        kv_heads * group,
        scaling=draw(st.sampled_from([None, 0.3])),
        softcap=draw(st.sampled_from([None, 2.0])),
        s_aux=sinks,
    )
