"""What the core asks of a model: one packed forward pass over a pool of cache slots.

There is no padding. A batch is one flat list of tokens; spans say which of them belong together and which slots each
may see. A runner keeps keys and values by slot and knows nothing of requests, trees or strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Span(NamedTuple):
    """A run of packed tokens that share a context: one request's part of a pass.

    Args:
        start: index of its first token in the batch.
        count: how many tokens it has.
        context: the slots that its tokens may see, their own slots included; a slice of consecutive slots (to be read
            as a view) or an array of slots. For a chain they stand in the order of the path.
        mask: `[count, len(context)]` bool, True where token i sees slot j (itself included). None for a chain: the
            context ends in the span's own slots in order, and token i sees the first `len(context) - count + i + 1`.
    """

    start: int
    count: int  # type: ignore[assignment]
    context: slice | NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None

    @property
    def context_length(self) -> int:
        """Count the slots of the context."""
        return self.context.stop - self.context.start if isinstance(self.context, slice) else len(self.context)


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward pass.

    Args:
        token_ids: `[n]`.
        positions: `[n]` place of each token in its own sequence, from 0.
        slots: `[n]` where each token's keys and values go. All different. A token that is run again keeps its slot.
        spans: cover `0..n` in order.
        wanted: `[m]` indices into the batch whose logits are wanted, ascending.
        hidden: layers whose hidden states are wanted, for all `n` tokens (0 the embedding, -1 after the final norm).
        layers: run only the first so many layers, then the final norm and the head; None: all.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    spans: Sequence[Span]
    wanted: NDArray[np.int64]
    hidden: Sequence[int] = ()
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a pass gives back.

    Args:
        logits: `[m, vocab]` in the model's dtype, on its device, after the model's own scaling and soft cap.
        hidden: layer -> `[n, width]`, for the layers that were asked for.
    """

    logits: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


class ModelRunner(Protocol):
    """A model that runs packed batches. `unspool.huggingface` and the test kit's exact models implement it."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def window(self) -> int | None:
        """Most positions that the model was made for; None: no limit."""
        ...

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        ...

    @property
    def layers(self) -> int:
        """How many layers it has."""
        ...

    @property
    def device(self) -> torch.device:
        """Where logits and hidden states live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype: of `Output.logits` and of hidden states."""
        ...

    @property
    def digest(self) -> str:
        """A short name of exactly these weights, for provenance."""
        ...

    def slot_bytes(self) -> int:
        """Bytes of keys and values that one slot takes."""
        ...

    def free_bytes(self) -> int:
        """Bytes of memory that are free on the device now."""
        ...

    def allocate(self, slots: int) -> None:
        """Make (or remake) the pool of keys and values. Called once, before the first pass."""
        ...

    def forward(self, batch: Batch) -> Output:
        """Run one packed pass, storing keys and values in the batch's slots."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the output matrix to an earlier layer: `[n, width]` -> `[n, vocab]`."""
        ...
