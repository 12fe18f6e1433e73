"""Weights as 8-bit integers: half of what bfloat16 reads, for passes of few tokens.

Each output channel has a scale, the greatest magnitude of its weights over 127, and each weight is the nearest multiple
of it (symmetric absmax quantization, Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outlier part).
The product is torch's own, or for bfloat16 rows the kernel's where it can (`projections.py`). Embeddings and norms stay
as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 32
"""torch's product reads and writes whole blocks, beyond the end of other sizes."""


class Int8Linear(nn.Module):
    """A linear layer with integer weights.

    Args:
        weight: `[out, in]` int8, from -127 to 127.
        scale: `[out]`, what a channel's integers are multiples of.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor
        self.scale: Tensor
        self.bias: nn.Parameter | None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    @classmethod
    def rounded(cls, linear: nn.Linear) -> Int8Linear:
        """Round the weights of a layer."""
        exact = linear.weight.detach().float()
        scale = exact.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return cls((exact / scale[:, None]).round().to(torch.int8), scale.to(linear.weight.dtype), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        if self.in_features % _BLOCK or self.out_features % _BLOCK:
            return nn.functional.linear(x, self._values(), self.bias)
        rows = x.reshape(-1, self.in_features)
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        product = product if self.bias is None else product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def plain(self) -> nn.Linear:
        """Give an ordinary layer with the same rounded weights, in the dtype of the scales."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._values(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def _values(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Round the weights of all linear layers of a model."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear.rounded(module))


@torch.no_grad()
def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn all layers of a model to a dtype, and integer weights into ordinary ones of the same values."""
    for module in list(model.modules()):
        if isinstance(module, Int8Linear):
            module.scale = module.scale.to(dtype)
    model.to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            model.set_submodule(name, module.plain())
