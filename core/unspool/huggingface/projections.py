"""Linear layers made quicker on a CPU, without a line of the model's own code.

A step of one row reads every weight once and does little else, so what counts is how few and how large the reads are:

- Projections of one and the same input (queries, keys and values; gate and up) are computed in one product. The first
  of them that is called computes all, the others take their columns. Which belong together is found by watching a pass.
- Weights are laid out once as oneDNN wants them. Otherwise float32 products of 1 to 12 rows take up to three times as
  long (the library lays the weights out anew for each), and bfloat16 ones a third more. It takes a second copy of the
  weights, so it is done where that fits into half of the free memory. A processor without instructions for
  half-precision numbers multiplies float32 several times faster: there the second copy of bfloat16 and float16 weights
  is float32.

Each change is checked on a random input and left out where the result differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unspool.huggingface.memory import free_bytes


class Joint:
    """Several projections of one input, computed together.

    Args:
        project: the joint projection.
        count: how many share it.
    """

    def __init__(self, project: nn.Module, count: int) -> None:
        self.project, self._count = project, count
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._left = 0

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Give columns of the joint projection of `x`, computing it if `x` is not the tensor of the last call."""
        if self._input is not x or self._output is None:
            self._input, self._output, self._left = x, self.project(x), self._count
        part = self._output[..., start:stop]
        self._left -= 1
        if not self._left:  # nobody else will ask: let go of both
            self._input = self._output = None
        return part


class Part(nn.Module):
    """One projection among several of the same input. Its `weight` is kept, for whoever reads it."""

    def __init__(self, linear: nn.Linear, joint: Joint, start: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.joint, self._start = joint, start

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        return self.joint.columns(x, self._start, self._start + self.out_features)


class Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it.

    Args:
        weight: `[out, in]`.
        bias: `[out]`, or None.
        dtype: in which it multiplies.
        keep: keep `weight` as it is too, for whoever reads it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, keep: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False) if keep else None, bias
        self.out_features, self.in_features = weight.shape
        self._dtype = dtype
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        own = x.to(self._dtype)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(own, self._packed, self._bias, "none", [], "")
        return product.to(x.dtype)


class Projection(nn.Module):
    """A linear layer whose product is the kernel's, for a few rows of bfloat16 (`kernel.multiplies`).

    Args:
        linear: the layer that it stands for. Its rows are a multiple of `WIDTHS` wide.
    """

    WIDTHS = 32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        width, depth = self.weight.shape
        product: Tensor = torch.ops.unspool.project(x.reshape(-1, depth), self.weight, self.bias)
        return product.view(*x.shape[:-1], width)


def multiply_by_kernel(model: nn.Module) -> None:
    """Have the kernel multiply in all linear layers of a model, and in those that are joined, as far as it can."""

    def by_kernel(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear) and module.in_features % Projection.WIDTHS == 0:
            return Projection(module)
        return module

    for name, module in list(model.named_modules()):
        if isinstance(module, Part):
            module.joint.project = by_kernel(module.joint.project)
        elif type(module) is nn.Linear:
            model.set_submodule(name, by_kernel(module))


@torch.no_grad()
def quicken(model: PreTrainedModel) -> None:
    """Replace linear layers of a model on a CPU by quicker ones that compute the same."""
    if model.device.type != "cpu":
        return
    packs = packing(model.dtype)
    if packs is not None and not _fits_twice(model, packs):
        packs = None
    join(model, packs)
    if packs is not None:
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear:
                packed = Packed(linear.weight.data, linear.bias, packs)
                if _same(linear, packed):
                    model.set_submodule(name, packed)


@torch.no_grad()
def join(model: PreTrainedModel, packs: torch.dtype | None = None) -> None:
    """Compute projections of one and the same input in one product, packed in a dtype or as they are."""
    for names in _siblings(model):
        linears = [model.get_submodule(name) for name in names]
        for name, part in zip(names, _joined([m for m in linears if isinstance(m, nn.Linear)], packs), strict=False):
            model.set_submodule(name, part)


def _fits_twice(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    size = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear) * dtype.itemsize
    return 2 * size < free_bytes(model.device)


def packing(dtype: torch.dtype) -> torch.dtype | None:
    """Say in which dtype weights of `dtype` are packed on this processor; None: not at all."""
    halves = (torch.bfloat16, torch.float16)
    if dtype == torch.float32 or dtype in halves:
        return next((packed for packed in (dtype, torch.float32) if can_pack(packed)), None)
    return None


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN is there, and multiplies such weights on this processor (half precision needs AVX-512)."""
    try:
        Packed(torch.zeros((16, 16), dtype=dtype), None, dtype)
    except (AttributeError, RuntimeError):
        return False
    return True


def _siblings(model: PreTrainedModel) -> list[list[str]]:
    """Watch a pass: linear layers of one parent that are given the same tensor, once each, one after another."""
    calls: list[tuple[str, str, int]] = []
    kept: list[Tensor] = []

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])  # as long as it lives its id is its own
            calls.append((name.rpartition(".")[0], name, id(args[0])))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [listen(name) for name, module in model.named_modules() if type(module) is nn.Linear]
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        model(torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    finally:
        model.set_attn_implementation(own)
        for handle in handles:
            handle.remove()
    groups: dict[tuple[str, int], list[str]] = {}
    for parent, name, tensor in calls:
        groups.setdefault((parent, tensor), []).append(name)
    called = [name for _, name, _ in calls]
    return [names for names in groups.values() if len(names) > 1 and all(called.count(name) == 1 for name in names)]


def _joined(linears: Sequence[nn.Linear], packs: torch.dtype | None) -> list[Part]:
    """Join linear layers of one input, if that gives what they give."""
    biases = [linear.bias for linear in linears]
    if any(bias is None for bias in biases) and not all(bias is None for bias in biases):
        return []
    if len({linear.weight.dtype for linear in linears}) > 1:
        return []
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if biases[0] is None else nn.Parameter(torch.cat([b.data for b in biases]), requires_grad=False)
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    whole.weight, whole.bias = nn.Parameter(weight, requires_grad=False), bias
    project = whole if packs is None else Packed(weight, bias, packs, keep=False)
    joint, parts, start = Joint(project, len(linears)), [], 0
    for linear in linears:
        part = Part(linear, joint, start)
        start += part.out_features
        parts.append(part)
    x = torch.randn(3, linears[0].in_features).to(weight.dtype)
    if not all(_close(linear(x), part(x)) for linear, part in zip(linears, parts, strict=True)):
        return []
    start = 0
    for part in parts if packs is None else ():  # keep the weights once, not twice
        end = start + part.out_features
        part.weight = nn.Parameter(weight[start:end], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias.data[start:end], requires_grad=False)
        start = end
    return parts


def _same(linear: nn.Linear, other: nn.Module) -> bool:
    x = torch.randn(3, linear.in_features).to(linear.weight.dtype)
    return _close(linear(x), other(x))


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 3e-2 if one.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))
