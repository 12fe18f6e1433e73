"""The pool: one slot a token, with its keys and values in every layer."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps and sees.

    Args:
        kv_heads: heads of its keys and values.
        key_width: width of one key.
        value_width: width of one value.
        dtype: of both.
        window: how many positions back a token sees, itself included; None: all.
    """

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def slot_bytes(self) -> int:
        """Count the bytes that one token takes in this layer."""
        return self.kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize


class Group:
    """Layers that are alike, with their keys and values in one tensor each, so that one call views them all.

    Args:
        layer: what they are like.
        count: how many they are.
        slots: slots of the pool.
        device: where the tensors live.
    """

    def __init__(self, layer: Layer, count: int, slots: int, device: torch.device) -> None:
        self.layer, self.slots = layer, slots
        shape = (count, 1, layer.kv_heads, slots)
        self.keys = _zeros((*shape, layer.key_width), layer.dtype, device)
        self.values = _zeros((*shape, layer.value_width), layer.dtype, device)
        # Views by row, made once: of everything, and of one long list of heads and slots (the fastest to pick from).
        self.row_keys, self.row_values = self.keys.unbind(0), self.values.unbind(0)
        self.flat_keys = [row.view(-1, layer.key_width) for row in self.row_keys]
        self.flat_values = [row.view(-1, layer.value_width) for row in self.row_values]


class Pool:
    """Keys and values of all slots in all layers, head-major, and the position that each slot holds.

    Args:
        layers: what each layer keeps.
        slots: how many tokens fit.
        device: where it lives.
    """

    def __init__(self, layers: Sequence[Layer], slots: int, device: torch.device) -> None:
        self.device = device
        self.positions = np.zeros(slots, dtype=np.int64)
        groups = {layer: Group(layer, layers.count(layer), slots, device) for layer in dict.fromkeys(layers)}
        self.places = [(groups[layer], layers[:number].count(layer)) for number, layer in enumerate(layers)]
        """Layer -> its group, and its row there."""
        self.rows = [group.row_keys[at] for group, at in self.places] + [
            group.row_values[at] for group, at in self.places
        ]
        """The keys of every layer, then the values of every layer, each `[1, kv heads, slots, width]`."""
        self._spoilt: Tensor | bool = False

    @property
    def windows(self) -> list[int | None]:
        """Give the windows that its layers have, each once."""
        return list(dict.fromkeys(group.layer.window for group, _ in self.places))

    def look_at(self, logits: Tensor) -> None:
        """Note whether a row of a pass, `[m, vocab]`, is NaN: so may its keys and values be, wherever they lie."""
        first = logits[:, 0]
        if self.device.type == "cpu":
            self._spoilt = self._spoilt or any(map(math.isnan, first.tolist()))
        else:  # nothing waits for it before somebody asks
            self._spoilt = first.isnan().any() | self._spoilt

    @property
    def spoilt(self) -> bool:
        """Tell whether some slot may hold NaN: then nothing may be read that is not seen, not even to be masked."""
        return bool(self._spoilt)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make zeros. In main memory the system gives the pages as they are first written, small ones.

    torch would touch them all. numpy asks for pages of 2 MB: a prompt writes a little of every head of every layer, and
    the system zeroes a whole page for each, which takes longer than the first pass.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        room = mmap.mmap(-1, size)
    else:
        room = mmap.mmap(-1, size, mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a system that has none
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=dtype).view(shape)
