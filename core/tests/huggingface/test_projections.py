"""Quicker linear layers compute what the model's own do."""

from __future__ import annotations

import pytest
import torch

from unspool.huggingface import projections
from unspool.huggingface.projections import Packed, Part, quicken
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
def test_weights_are_packed_within_rounding_in_what_the_processor_multiplies(
    able: tuple[torch.dtype, ...] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if able is not None:
        monkeypatch.setattr(projections, "can_pack", lambda dtype: dtype in able)
    model = tiny_model("llama", dtype=dtype)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        quicken(model)
        after = model(ids, use_cache=False).logits
    packed = isinstance(model.get_submodule("model.layers.0.self_attn.o_proj"), Packed)
    assert packed == (projections.packing(dtype) is not None)
    assert packed or able == ()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


def test_weights_that_do_not_fit_into_memory_twice_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "free_bytes", lambda device: 1000)
    model = tiny_model("llama", dtype=torch.float32)
    quicken(model)
    assert not any(isinstance(module, Packed) for module in model.modules())
