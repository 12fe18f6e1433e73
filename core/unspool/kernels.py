"""Operators that a model's runner brings on a CPU: they read everything once or twice (`huggingface/kernel.py`).

The functions of the core that use them give the same in plain torch, wherever there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALL = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that they can read. What they compute is float32."""


def by_kernel(name: str, values: Tensor, *dtypes: torch.dtype) -> Callable[..., Any] | None:
    """Give an operator if it is there and `values`, on a CPU, are of a dtype that it takes."""
    fits = values.device.type == "cpu" and values.dtype in dtypes
    return getattr(torch.ops.unspool, name, None) if fits else None
