"""Tiny random networks of real architectures, for checking a runner or a strategy against a model that really attends.

They have a vocabulary of 64, three layers and weights wide enough that the likeliest token changes from place to place.
The same name and seed give the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED: Mapping[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA: Mapping[str, Any] = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 16}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "cohere": {**_GROUPED, "logit_scale": 0.5},
    "cohere2": {**_GROUPED, **_SLIDING, "head_dim": 8, "logit_scale": 0.5},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GEMMA, **_SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, **_SLIDING},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_oss": {**_GROUPED, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        **_GROUPED,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 6, "head_dim": 8},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "starcoder2": _GROUPED,
}
"""Name of an architecture, as transformers' `model_type` -> what its tiny config sets beside the common sizes."""


def tiny_model(arch: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """Make a tiny random model, ready to run.

    Args:
        arch: a name in `ARCHITECTURES`, or any other `model_type` if `overrides` sets the sizes that are its own.
        dtype: of its weights.
        overrides: settings of its config; `seed` (default 0) chooses other weights.

    Returns:
        The model in eval mode on the CPU. Token 1 ends a text, 2 begins one, 0 pads.
    """
    seed = overrides.pop("seed", 0)
    config = AutoConfig.for_model(arch, **{**_SIZES, **ARCHITECTURES.get(arch, {}), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = make(config, experts_implementation="eager")
    model.to(dtype).train(False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            else:  # norms and biases: near what they were, but no longer one and zero
                parameter.add_(0.1 * noise)
    return model
