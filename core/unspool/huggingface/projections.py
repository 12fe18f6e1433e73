"""Linear layers made quicker on a CPU, without a line of the model's own code.

A step of one row reads every weight once and does little else, so what counts is how few and how large the reads are:

- Projections of one and the same input (queries, keys and values; gate and up) are computed in one product. The first
  of them that is called computes all, the others take their columns. Which belong together is found by watching a pass.
- Weights are laid out once in the order in which they are read. It takes a second copy of the weights, so it is done
  where that fits into half of the free memory. Rows of bfloat16 are multiplied by the kernel where it can
  (`kernel.py`), with bfloat16 or integer weights. Others lie as oneDNN wants them: otherwise float32 products of 1 to
  12 rows take up to three times as long (the library lays the weights out anew for each), and bfloat16 ones a third
  more. A processor without instructions for half-precision numbers multiplies float32 several times faster: there the
  second copy of bfloat16 and float16 weights is float32.

- A gated unit, the SiLU of one projection times another of the same input, is computed where the two are: group beside
  group of columns, and nothing but the result is written down.

Each change is checked on a random input and left out where the result differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unspool.huggingface import kernel
from unspool.huggingface.int8 import Int8Linear
from unspool.huggingface.memory import free_bytes

Linear = nn.Linear | Int8Linear


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
    """One projection among several of the same input. Its weights are kept, for whoever reads them."""

    def __init__(self, linear: Linear, joint: Joint, start: int) -> None:
        super().__init__()
        _keep(self, linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.joint, self._start = joint, start

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        return self.joint.columns(x, self._start, self._start + self.out_features)


class Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it.

    Args:
        linear: the layer that it stands for.
        dtype: in which it multiplies.
        keep: keep its weights as they are too, for whoever reads them.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, keep: bool = True) -> None:
        super().__init__()
        if keep:
            _keep(self, linear)
        self.out_features, self.in_features = linear.weight.shape
        self._dtype = dtype
        self._added = None if linear.bias is None else linear.bias.detach().to(dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        own = x.to(self._dtype)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(own, self._packed, self._added, "none", [], "")
        return product.to(x.dtype)


class Projection(nn.Module):
    """A linear layer whose product is the kernel's (`products.cpp`), in bfloat16.

    Args:
        linear: the layer that it stands for: `takes` says whether it can.
        keep: keep its weights as they are too, for whoever reads them.
    """

    _DEPTH = 8  # the kernel reads so many numbers of a row at once
    _laid: Tensor
    _scale: Tensor | None

    def __init__(self, linear: Linear, *, keep: bool = True) -> None:
        super().__init__()
        if keep:
            _keep(self, linear)
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.scale.float() if isinstance(linear, Int8Linear) else None
        self._added = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("_laid", torch.ops.unspool.lay_out(linear.weight.detach()), persistent=False)

    @classmethod
    def takes(cls, linear: Linear) -> bool:
        """Say whether it can stand for a layer."""
        return cls.fits(linear) and _dtype(linear) == torch.bfloat16

    @classmethod
    def fits(cls, linear: Linear | Part | Packed | Projection) -> bool:
        """Say whether the kernel takes rows as wide as a layer's."""
        return linear.in_features % cls._DEPTH == 0

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        product: Tensor = torch.ops.unspool.project(rows, self._laid, self._scale, self._added, self.out_features)
        return product.view(*x.shape[:-1], self.out_features).to(x.dtype)


class Interleaved(nn.Module):
    """A joint projection of two as wide as each other, whose columns lie by turns: some of the one, some of the other.

    Args:
        joint: the projection that it stands for: `takes` says whether it can.
    """

    _COLUMNS = 32  # of a group of the kernel's

    _laid: Tensor
    _scale: Tensor | None

    def __init__(self, joint: Projection) -> None:
        super().__init__()
        self.out_features, self.in_features = joint.out_features, joint.in_features
        self._halves = joint.out_features // 2
        self.register_buffer("_laid", self._by_turns(joint._laid, 1), persistent=False)
        self.register_buffer("_scale", self._by_turns(joint._scale, self._COLUMNS), persistent=False)
        self._added = self._by_turns(joint._added, self._COLUMNS)

    @classmethod
    def takes(cls, joint: nn.Module) -> TypeGuard[Projection]:
        """Say whether it can stand for a joint projection."""
        return isinstance(joint, Projection) and joint.out_features % (2 * cls._COLUMNS) == 0

    def _by_turns(self, values: Tensor | None, size: int) -> Tensor | None:
        """Put pieces of `size` of the second half between those of the first."""
        if values is None:
            return None
        return values.view(2, -1, size, *values.shape[1:]).transpose(0, 1).reshape(values.shape)

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[..., in]` to `[..., out]`, one projection behind the other."""
        weights = self._laid, self._scale, self._added
        product: Tensor = torch.ops.unspool.project(self._rows(x), *weights, self.out_features)
        in_order = product.view(len(product), -1, 2, self._COLUMNS).transpose(1, 2)
        return in_order.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def gated(self, x: Tensor) -> Tensor:
        """Give the SiLU of the first projection of `x` times the second: `[..., in]` to `[..., out / 2]`."""
        weights = self._laid, self._scale, self._added
        product: Tensor = torch.ops.unspool.project_gated(self._rows(x), *weights, self._halves)
        return product.view(*x.shape[:-1], self._halves).to(x.dtype)


class Gated(nn.Module):
    """A module that projects, gates and projects back, with the first two steps in one. It keeps the parts by name.

    Args:
        whole: the module that it stands for.
        project: of its two projections of the input.
        back: the name of its projection of what they give.
    """

    def __init__(self, whole: nn.Module, project: Interleaved, back: str) -> None:
        super().__init__()
        for name, part in whole.named_children():
            self.add_module(name, part)
        self._project, self._back = project, back

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for `x` `[..., in]`."""
        found: Tensor = self.get_submodule(self._back)(self._project.gated(x))
        return found


class Layout(Protocol):
    """Makes layers whose weights lie in the order in which they are read."""

    def __call__(self, linear: Linear, *, keep: bool) -> nn.Module | None:
        """Lay a layer out; None: it cannot."""
        ...


def multiplied_by_kernel(model: PreTrainedModel) -> bool:
    """Say whether the kernel multiplies, or would, by most weights of a model."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not kernel.multiplies():
        return False
    looked_up, own = set(), set()  # where they lie: quickened or not, weights stay there
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            looked_up.add(module.weight.data_ptr())
        elif isinstance(module, (nn.Linear, Int8Linear, Part, Packed, Projection)) and Projection.fits(module):
            own.add(cast(Tensor, module.weight).data_ptr())
    state: dict[str, Tensor] = model.state_dict()
    weights = {weight.data_ptr(): weight.numel() for weight in state.values() if weight.dim() > 1}
    within = {place: count for place, count in weights.items() if place not in looked_up}
    multiplied = sum(count for place, count in within.items() if place in own)
    return 2 * multiplied > sum(within.values())


def quicken(model: PreTrainedModel, *, by_kernel: bool = True) -> None:
    """Replace linear layers of a model on a CPU by quicker ones that compute the same.

    Args:
        model: the model, which is changed.
        by_kernel: have the kernel multiply, where it can.
    """
    if model.device.type == "cpu":
        _replace(model, _layout(model, by_kernel))


def multiply_by_kernel(model: PreTrainedModel) -> None:
    """Have the kernel multiply in all linear layers of a model where it can."""

    def layout(linear: Linear, *, keep: bool) -> nn.Module | None:
        return Projection(linear, keep=keep) if Projection.takes(linear) else None

    _replace(model, layout)


@torch.no_grad()
def _replace(model: PreTrainedModel, layout: Layout | None) -> None:
    join(model, layout)
    for name, linear in list(model.named_modules()):
        if layout is not None and _linear(linear):
            laid = layout(linear, keep=True)
            if laid is not None and _same(linear, laid):
                model.set_submodule(name, laid)
    for name, whole in list(model.named_modules()):
        if (gated := _gated(whole)) is not None:
            model.set_submodule(name, gated)


def _gated(whole: nn.Module) -> Gated | None:
    """Give what computes a gated unit sooner; None: it is none, or is not by the kernel."""
    parts = [part for part in whole.children() if isinstance(part, Part)]
    others = {name: child for name, child in whole.named_children() if not isinstance(child, Part)}
    if len(parts) != 2 or len(others) != 2 or parts[0].joint is not parts[1].joint:
        return None
    if whole._parameters or whole._buffers:  # it does something more
        return None
    joint, width, plain = parts[0].joint, parts[0].out_features, parts[0].joint.project
    back = [name for name, child in others.items() if getattr(child, "in_features", None) == width]
    acts = [child for name, child in others.items() if name not in back]
    if len(back) != 1 or parts[1].out_features != width or not Interleaved.takes(plain):
        return None
    values, x = torch.linspace(-20, 20, 401), torch.randn(3, parts[0].in_features).to(torch.bfloat16)
    try:
        if torch.allclose(acts[0](values), nn.functional.silu(values), atol=1e-6):
            before, project = whole(x), Interleaved(plain)
            gated = Gated(whole, project, back[0])
            if _close(before, gated(x)):
                joint.project = project  # the same weights, once
                return gated
    except Exception:  # it takes or gives something else
        return None
    return None


def _layout(model: PreTrainedModel, by_kernel: bool) -> Layout | None:
    """Say how weights of a model are laid out on this machine; None: they are left as they are."""
    packs = packing(model.dtype)
    size = sum(module.weight.numel() for module in model.modules() if _linear(module))
    free = free_bytes(model.device)

    def layout(linear: Linear, *, keep: bool) -> nn.Module | None:
        if by_kernel and kernel.multiplies() and Projection.takes(linear):
            return Projection(linear, keep=keep)
        return Packed(linear, packs, keep=keep) if packs is not None and type(linear) is nn.Linear else None

    return layout if 2 * size * (packs or model.dtype).itemsize < free else None


@torch.no_grad()
def join(model: PreTrainedModel, layout: Layout | None = None) -> None:
    """Compute projections of one and the same input in one product, laid out or as they are."""
    for names in _siblings(model):
        for name, part in zip(names, _joined([model.get_submodule(name) for name in names], layout), strict=False):
            model.set_submodule(name, part)


def packing(dtype: torch.dtype) -> torch.dtype | None:
    """Say in which dtype weights of `dtype` are packed on this processor; None: not at all."""
    halves = (torch.bfloat16, torch.float16)
    if dtype == torch.float32 or dtype in halves:
        return next((packed for packed in (dtype, torch.float32) if can_pack(packed)), None)
    return None


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN is there, and multiplies such weights on this processor (half precision needs AVX-512)."""
    try:
        Packed(_plain(torch.zeros((16, 16), dtype=dtype), None), dtype)
    except (AttributeError, RuntimeError):
        return False
    return True


def _linear(module: nn.Module) -> TypeGuard[Linear]:
    return type(module) in (nn.Linear, Int8Linear)


def _keep(module: nn.Module, linear: Linear) -> None:
    """Keep the weights of a layer under their names."""
    for name, parameter in linear._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in linear._buffers.items():
        module.register_buffer(name, buffer)


def _siblings(model: PreTrainedModel) -> list[list[str]]:
    """Watch a pass: linear layers of one parent that are given the same tensor, once each, one after another."""
    calls: list[tuple[str, str, int]] = []
    kept: list[Tensor] = []

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])  # as long as it lives its id is its own
            calls.append((name.rpartition(".")[0], name, id(args[0])))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [listen(name) for name, module in model.named_modules() if _linear(module)]
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


def _joined(linears: Sequence[nn.Module], layout: Layout | None) -> list[Part]:
    """Join linear layers of one input, if that gives what they give."""
    own = [linear for linear in linears if _linear(linear)]
    if len({(type(linear), _dtype(linear), linear.bias is None) for linear in own}) > 1:
        return []
    whole = _whole(own)
    laid = None if layout is None else layout(whole, keep=False)
    joint, parts, ends = Joint(whole if laid is None else laid, len(own)), [], [0]
    for linear in own:
        parts.append(Part(linear, joint, ends[-1]))
        ends.append(ends[-1] + linear.out_features)
    x = torch.randn(3, whole.in_features).to(_dtype(whole))
    if not all(_close(linear(x), part(x)) for linear, part in zip(own, parts, strict=True)):
        return []
    if laid is None:  # keep the weights once, not twice
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
            for name, parameter in whole.named_parameters():
                part.register_parameter(name, nn.Parameter(parameter[start:end], requires_grad=False))
            for name, buffer in whole.named_buffers():
                part.register_buffer(name, buffer[start:end])
    return parts


def _whole(linears: Sequence[Linear]) -> Linear:
    """Give one layer whose output is that of several of one kind, beside each other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    scales = [linear.scale for linear in linears if isinstance(linear, Int8Linear)]
    if scales:
        return Int8Linear(weight, torch.cat(scales), bias)
    return _plain(weight, bias)


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def _dtype(linear: Linear) -> torch.dtype:
    return (linear.scale if isinstance(linear, Int8Linear) else linear.weight).dtype


def _same(linear: Linear, other: nn.Module) -> bool:
    x = torch.randn(3, linear.in_features).to(_dtype(linear))
    return _close(linear(x), other(x))


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 3e-2 if one.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))
