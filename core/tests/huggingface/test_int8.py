"""Integer weights are the nearest ones, and a model with them runs like any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unspool.errors import InputError
from unspool.huggingface import HuggingFaceRunner
from unspool.huggingface.int8 import Int8Linear, quantize, widen
from unspool.huggingface.load import load
from unspool_testing.networks import ARCHITECTURES, tiny_model

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 256]))


@given(SIZES, SIZES, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
@settings(max_examples=40, deadline=None)
def test_a_product_is_that_of_the_rounded_weights(
    wide: int, tall: int, bias: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    linear = nn.Linear(wide, tall, bias).to(dtype)
    linear.weight.data = torch.randn(tall, wide, generator=generator).to(dtype)
    linear.weight.data[0] = 0  # a channel without weights
    x = torch.randn(2, 3, wide, generator=generator).to(dtype)
    rounded = Int8Linear.rounded(linear)
    plain = rounded.plain()
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert bool(((plain.weight - linear.weight).abs() <= step * (0.51 if dtype == torch.float32 else 1.2)).all())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(rounded(x), plain(x), rtol=tolerance, atol=tolerance * (wide**0.5 + 1))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3", "opt"])
@torch.inference_mode()
def test_a_quantized_model_runs_packed_as_by_itself_and_stays_near_the_exact_one(arch: str) -> None:
    assert arch in ARCHITECTURES
    exact, model = tiny_model(arch, torch.float32), tiny_model(arch, torch.float32)
    quantize(model)
    HuggingFaceRunner(model)  # the probe compares it packed with itself
    assert not any(type(module) is nn.Linear for module in model.modules())
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 20)[None]
    near, right = model(ids, use_cache=False).logits, exact(ids, use_cache=False).logits
    assert (near - right).square().mean().sqrt() < 0.2 * right.std()
    widen(model, torch.float64)
    torch.testing.assert_close(model(ids, use_cache=False).logits.float(), near, rtol=1e-3, atol=1e-3)


def test_the_digest_names_integer_weights_too() -> None:
    digests = []
    for sign in (1, 1, -1):
        model = tiny_model("llama", torch.float32)
        model.get_parameter("model.layers.0.mlp.down_proj.weight").data *= sign
        quantize(model)
        digests.append(HuggingFaceRunner(model).digest)
    assert digests[0] == digests[1] != digests[2]


def test_int8_on_a_gpu_is_refused_with_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="int8 is for a CPU, not cuda: take torchao-int8"):
        load("smollm2", device="cuda", quantization="int8")
