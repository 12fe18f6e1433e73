"""Quicker linear layers compute what the model's own do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from unspool.huggingface import HuggingFaceRunner, kernel, projections
from unspool.huggingface.int8 import Int8Linear, quantize, widen
from unspool.huggingface.projections import Gated, Packed, Part, Projection, multiplied_by_kernel, quicken
from unspool_testing.networks import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quickened_model_gives_the_logits_of_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        quicken(model)
        after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_projections_of_one_input_are_joined_and_keep_their_weights() -> None:
    model = tiny_model("llama")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    quicken(model)
    attention = model.get_submodule("model.layers.0.self_attn")
    mlp = model.get_submodule("model.layers.0.mlp")
    joined = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    assert all(isinstance(module, Part) for module in joined)
    assert not isinstance(attention.o_proj, Part)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_joined_projections_that_are_packed_keep_the_weights_that_the_model_has() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    if projections.packing(torch.float32) is None:
        pytest.skip("oneDNN is not there")
    places = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    quicken(model)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), Part)
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("able", [None, (), (torch.float32,)])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_weights_are_laid_out_within_rounding_for_what_the_processor_multiplies(
    by_kernel: bool, able: tuple[torch.dtype, ...] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if able is not None:
        monkeypatch.setattr(projections, "can_pack", lambda dtype: dtype in able)
    model = tiny_model("llama", dtype=dtype)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        quicken(model, by_kernel=by_kernel)
        after = model(ids, use_cache=False).logits
    output = model.get_submodule("model.layers.0.self_attn.o_proj")
    if by_kernel and dtype == torch.bfloat16 and kernel.multiplies():
        assert isinstance(output, Projection)
    else:
        packed = isinstance(output, Packed)
        assert packed == (projections.packing(dtype) is not None)
        assert packed or able == ()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "opt", "gpt2"])
@pytest.mark.parametrize("integers", [False, True])
@torch.inference_mode()
def test_products_by_the_kernel_are_those_of_the_layers_and_a_row_is_the_same_beside_any(
    integers: bool, architecture: str
) -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    model, exact = (tiny_model(architecture, dtype=torch.bfloat16) for _ in range(2))
    if integers:
        quantize(model)
        quantize(exact)
    state = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    mostly = multiplied_by_kernel(model)
    assert mostly == (architecture != "gpt2"), "its weights are not in linear layers"
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    widen(exact, torch.float32)
    before = exact(ids, use_cache=False).logits
    quicken(model)
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == state
    assert multiplied_by_kernel(model) == mostly
    linears = [each for each in model.modules() if isinstance(each, (Projection, Part))]
    assert linears
    assert not any(type(module) in (nn.Linear, Int8Linear) for module in model.modules())
    after = model(ids, use_cache=False).logits
    assert (after.float() - before).square().mean().sqrt() < 0.05 * before.std()
    for linear in linears:
        rows = torch.randn(40, linear.in_features).bfloat16()
        assert all(torch.equal(linear(rows[:n]), linear(rows)[:n]) for n in (1, 2, 7, 8, 9, 17, 39))


def gating(act: str, *, width: int = 64, bias: bool = False) -> Any:
    """Give a small Llama whose feed-forward layers are as wide as a gated product has to be."""
    config: Any = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=act,
        mlp_bias=bias,
    )
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config)
    return made.to(torch.bfloat16).eval()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_gated_unit_is_computed_in_one_and_its_parts_remain(bias: bool, integers: bool) -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    model, exact = gating("silu", bias=bias), gating("silu", bias=bias)
    if integers:
        quantize(model)
        quantize(exact)
    state = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    ids = torch.randint(3, 60, (2, 40))
    widen(exact, torch.float32)
    before = exact(ids, use_cache=False).logits
    quicken(model)
    units = [module for module in model.modules() if isinstance(module, Gated)]
    assert len(units) == 2
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == state
    assert multiplied_by_kernel(model)
    after = model(ids, use_cache=False).logits
    assert (after.float() - before).square().mean().sqrt() < 0.02 * before.std()
    x = torch.randn(3, 32).bfloat16()
    own = exact.get_submodule("model.layers.0.mlp")
    for name in ("gate_proj", "up_proj"):
        part = units[0].get_submodule(name)
        torch.testing.assert_close(part(x).float(), own.get_submodule(name)(x.float()), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("act", "width"), [("gelu", 64), ("gelu_pytorch_tanh", 64), ("relu", 64), ("silu", 72)])
def test_other_units_are_left_as_they_are(act: str, width: int) -> None:
    model = gating(act, width=width)
    quicken(model)
    assert not any(isinstance(module, Gated) for module in model.modules())


@torch.no_grad()
def test_what_only_looks_like_a_gated_unit_is_not_taken_for_one() -> None:
    class Sum(nn.Module):
        gate: Any
        up: Any
        back: Any

        def __init__(self, whole: Any) -> None:
            super().__init__()
            self.gate, self.up, self.back, self.act = whole.gate_proj, whole.up_proj, whole.down_proj, nn.SiLU()

        def forward(self, x: Tensor) -> Any:
            return self.back(self.act(self.gate(x)) + self.up(x))

    class Pair(Sum):
        def forward(self, x: Tensor) -> Any:
            return self.back(self.act(self.gate(x)) * self.up(x)), x

    class Whole(Sum):
        def forward(self, x: Tensor) -> Any:
            return self.back(self.act(self.gate(x)) * self.up(x))

    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    for kind, is_one in ((Whole, True), (Sum, False), (Pair, False)):
        unit = kind(gating("silu").get_submodule("model.layers.0.mlp"))
        unit.gate, unit.up = projections._joined(
            [unit.gate, unit.up], lambda linear, keep: Projection(linear, keep=keep)
        )
        assert (projections._gated(unit) is not None) == is_one


def test_weights_that_do_not_fit_into_memory_twice_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "free_bytes", lambda device: 1000)
    model = tiny_model("llama", dtype=torch.float32)
    quicken(model)
    assert not any(isinstance(module, Packed) for module in model.modules())


def test_the_output_matrix_of_earlier_layers_is_quick_too() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    runner = HuggingFaceRunner(model)
    hidden = torch.randn(3, runner.width, generator=torch.Generator().manual_seed(0))
    before = runner.head(hidden)
    runner.quicken()
    head = model.get_submodule("lm_head")
    assert isinstance(head, Packed) == (projections.packing(torch.float32) is not None)
    asked: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    torch.testing.assert_close(runner.head(hidden), before, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1
