"""The survey: a first look at how a model's layers call their attention, and whether a pool can serve them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface.attention import Call
from unspool.huggingface.pool import Layer

_RUNS = {"full_attention", "sliding_attention"}
_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux"}
# What says nothing about how tokens attend, given that the model is in eval mode and has no cache.
_IDLE = {
    "cache_position",
    "dropout",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


@dataclass
class Survey:
    """What is learnt from one pass in which nothing attends: it stands in for a plan."""

    modules: list[nn.Module] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)

    def attend(self, call: Call) -> Tensor:
        """Note one layer's shapes, and give zeros.

        Raises:
            ModelError: the layer asks for what we do not do.
        """
        module, settings = call.module, call.settings
        odd = {name for name, setting in settings.items() if setting is not None} - _HONOURED - _IDLE
        if settings.get("is_causal"):
            odd.discard("is_causal")
        if call.mask is not None:
            odd.add("attention_mask")
        if odd:
            raise ModelError(f"its attention asks for {', '.join(sorted(odd))}, which a packed pass cannot honour")
        if not getattr(module, "is_causal", True):
            raise ModelError(f"{type(module).__name__} looks ahead: this is no causal language model")
        (_, heads, tokens, _), (_, kv_heads, own, width) = call.query.shape, call.key.shape
        if own != tokens or heads % kv_heads:
            raise ModelError(f"{type(module).__name__} attends to other tokens than the batch's own")
        kept = call.value.shape[3]
        self.modules.append(module)
        self.layers.append(Layer(kv_heads, width, kept, call.key.dtype, settings.get("sliding_window")))
        return call.query.new_zeros(1, tokens, heads, kept)


def refuse_by_config(config: PreTrainedConfig) -> None:
    """Refuse what the config alone shows to be no plain causal attention.

    Raises:
        ModelError: with the reason.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ModelError("it is an encoder-decoder: only decoder-only (causal) language models can be run")
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if odd := sorted(set(kinds) - _RUNS - {"attention"}):
        raise ModelError(
            f"it has {', '.join(odd)} layers: only full and sliding-window attention keeps what it needs in token slots"
        )


def survey(model: PreTrainedModel) -> tuple[Survey, str, Tensor]:
    """Look at a model whose attention is ours.

    Returns:
        The survey, the name of the model's list of layers, and the logits `[1, vocab]` that came out.

    Raises:
        ModelError: it cannot be run packed, with the reason.
    """
    for name in ("position_ids", "logits_to_keep"):
        if name not in inspect.signature(model.forward).parameters:
            raise ModelError(f"its forward has no {name}")
    found = Survey()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=token, position_ids=token, use_cache=False, unspool=found).logits[0]
    text = model.config.get_text_config(decoder=True)
    if not found.modules:
        raise ModelError(
            "its layers do not call transformers' attention interface (it is recurrent, or brings its own)"
        )
    kinds = getattr(text, "layer_types", None)
    for number, layer in enumerate(found.layers):
        if kinds and kinds[number] == "sliding_attention" and layer.window is None:
            raise ModelError(f"layer {number} has a sliding window, but does not tell its attention how wide")
    return found, _layers_name(model, found, text.num_hidden_layers), logits


def _layers_name(model: PreTrainedModel, found: Survey, expected: int) -> str:
    """Find the module list whose elements attended once each, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    owners = [names[id(module)].split(".") for module in found.modules]
    for depth in range(1, min(map(len, owners))):
        name = ".".join(owners[0][:depth])
        layers = model.get_submodule(name)
        if isinstance(layers, nn.ModuleList):
            order = [owner[: depth + 1] for owner in owners]
            if order == [[*owners[0][:depth], str(number)] for number in range(expected)]:
                return name
    raise ModelError(f"attention ran {len(found.modules)} times in {expected} layers, not once in each, in their order")
