"""A model that cannot be run packed is refused when it is loaded, with the reason, and left as it was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from unspool.errors import ModelError
from unspool.huggingface import HuggingFaceRunner, attention
from unspool.huggingface.plan import Plan
from unspool.huggingface.pool import Layer, Pool
from unspool_testing.networks import tiny_model

GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("arch", "settings", "reason"),
    [
        ("mamba", {"num_hidden_layers": 2, "state_size": 4}, "token slots|position_ids"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "position_ids|attention interface"),
        ("falcon", {"num_kv_heads": 4, "ffn_hidden_size": 48}, "attention interface"),
        ("stablelm", GROUPED, "keeps keyword arguments"),
        (
            "llama4_text",
            {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
            "chunked_attention",
        ),
        (
            "qwen3_next",
            {
                **GROUPED,
                "head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
            },
            "linear_attention",
        ),
        ("bert", {"intermediate_size": 48}, "logits_to_keep|looks ahead"),
    ],
)
def test_a_model_without_plain_causal_attention_is_refused(arch: str, settings: dict[str, Any], reason: str) -> None:
    model = tiny_model(arch, torch.float32, **settings)
    own = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason):
        HuggingFaceRunner(model)
    assert model.config._attn_implementation == own


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        HuggingFaceRunner(T5ForConditionalGeneration(config))


def test_a_model_that_comes_out_different_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Plan.attend
    monkeypatch.setattr(Plan, "attend", lambda plan, call: own(plan, call) * 1.1)
    with pytest.raises(
        ModelError, match=r"differ from its own by .* of their spread \(allowed: 0.0001 in torch.float64"
    ):
        HuggingFaceRunner(tiny_model("llama"))


def test_a_model_with_nonfinite_logits_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        HuggingFaceRunner(model)


def test_attention_that_asks_for_what_we_do_not_honour_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.attend

    def biased(*args: Any, **settings: Any) -> Any:
        return own(*args, **settings, position_bias=torch.zeros(1))

    monkeypatch.setattr(attention, "attend", biased)
    with pytest.raises(ModelError, match="asks for position_bias"):
        HuggingFaceRunner(tiny_model("llama"))
    monkeypatch.undo()
    attention.register()


def test_a_model_called_without_its_runner_says_so() -> None:
    model = tiny_model("llama")
    HuggingFaceRunner(model)
    with pytest.raises(ModelError, match="called directly"):
        model(input_ids=torch.tensor([[3, 4]]))
    model.set_attn_implementation("sdpa")
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 64)


def test_a_sliding_window_that_is_ignored_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pool.__init__

    def wide(pool: Pool, layers: Sequence[Layer], slots: int, device: torch.device) -> None:
        own(pool, [dataclasses.replace(layer, window=None) for layer in layers], slots, device)

    monkeypatch.setattr(Pool, "__init__", wide)
    with pytest.raises(ModelError, match="differ from its own"):
        HuggingFaceRunner(tiny_model("mistral"))


def test_loading_registers_and_importing_does_not() -> None:
    script = (
        "import transformers, unspool.huggingface.attention as a;"
        "assert a.NAME not in transformers.AttentionInterface().valid_keys();"
        "a.register(); assert a.NAME in transformers.AttentionInterface().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
