"""The one function that every layer of a Hugging Face model calls in place of its own attention.

It is registered with transformers' `AttentionInterface` under the name `unspool`, and finds what to do in the keyword
`unspool` that the runner gave to the model's forward: a `Plan` that attends, or a `Survey` that only looks. No mask
function is registered under the name: transformers then makes no masks, and each plan builds its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from unspool.errors import ModelError

NAME = "unspool"
"""The attention implementation's name, and the keyword that carries the step's plan."""


class Call(NamedTuple):
    """What one layer hands over.

    Args:
        module: the layer's attention.
        query: `[1, heads, n, width]`.
        key: `[1, kv heads, n, width]`.
        value: `[1, kv heads, n, value width]`.
        mask: a mask of the model's own making; None where it relies on transformers' masks.
        settings: the other keyword arguments.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    settings: dict[str, Any]


class Attends(Protocol):
    """What the model's forward carries to each of its layers."""

    def attend(self, call: Call) -> Tensor:
        """Attend in the next layer, giving `[1, n, heads, value width]`."""
        ...


def register() -> None:
    """Register the attention function. Doing so again changes nothing."""
    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    unspool: Attends | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Hand one layer's queries, keys and values to the plan of this pass.

    Raises:
        ModelError: the plan did not arrive: the model keeps keyword arguments from its layers, or was called by
            somebody else than its runner.
    """
    if unspool is None:
        raise ModelError(
            f"no plan reached {type(module).__name__}: the model keeps keyword arguments from its attention, or was "
            "called directly; to use it without Unspool again, call model.set_attn_implementation('sdpa')"
        )
    return unspool.attend(Call(module, query, key, value, attention_mask, settings)), None
