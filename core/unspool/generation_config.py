"""Transformers' `GenerationConfig`, field by field: what each becomes here, or why it becomes nothing.

A model's own `generation_config.json` is the lowest layer of every config, and the keywords of `generate()` can be
given in place of ours. The plugins stand in the order in which transformers applies its processors, with its defaults:
under `do_sample` a `top_k` that nobody gives is 50.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unspool.config import Variation, validate
from unspool.errors import ConfigError, InputError, ModelError, Problem
from unspool.layers import Layer, Merged
from unspool.registry import Registry
from unspool.spec import nearest

SOURCE = "the model's generation config"
"""What values of the lowest layer name as their source."""
DETERMINISTIC = frozenset({"greedy", "beam", "diverse_beam", "constrained_beam", "contrastive_search"})
"""Strategies that transformers runs without `do_sample`, so without its samplers."""

_NEUTRAL_IF_ONE = (1, 1.0)
_SPEED = "changes speed, not tokens"
_CACHE = f"the cache is the engine's own: {_SPEED}"
_SPECULATION = f"speculation {_SPEED}: name a drafter among the plugins"
_ENCODER = "encoder-decoder models are not supported"
_GONE = "left transformers' core"


@dataclass(frozen=True)
class AsPlugin:
    """The field becomes a plugin.

    Args:
        plugin: its name.
        params: maps the field's value to the plugin's parameters.
        neutral: values that change nothing, so that no plugin is named.
        sampler: it acts under `do_sample` alone.
    """

    plugin: str
    params: Callable[[Any], dict[str, Any]]
    neutral: Callable[[Any], bool] = lambda value: False
    sampler: bool = False


@dataclass(frozen=True)
class AsSetting:
    """The field becomes a setting of the config: `limits.deadline`, `n`, or the choice of the `strategy`."""

    setting: str


@dataclass(frozen=True)
class Ignored:
    """The field has no bearing on the tokens, and this is why."""

    reason: str


@dataclass(frozen=True)
class Unsupported:
    """The field would change the tokens and is not honoured, and this is why.

    Args:
        reason: what to do instead.
        neutral: values that change nothing, so that nobody need be told.
    """

    reason: str
    neutral: tuple[object, ...] = ()


Meaning = AsPlugin | AsSetting | Ignored | Unsupported


def _sampler(plugin: str, param: str, off: Callable[[Any], bool], **fixed: Any) -> AsPlugin:
    return AsPlugin(plugin, lambda value: {param: value, **fixed}, off, sampler=True)


FIELDS: Mapping[str, Meaning] = {
    # Plugins, in the order in which transformers applies them.
    "guidance_scale": AsPlugin("guidance", lambda value: {"scale": value}, lambda value: value == 1),
    "sequence_bias": AsPlugin("sequence_bias", lambda value: {"sequences": _sequence_biases(value)}),
    "repetition_penalty": AsPlugin("repetition_penalty", lambda value: {"penalty": value}, lambda value: value == 1),
    "no_repeat_ngram_size": AsPlugin("no_repeat_ngram", lambda value: {"n": value}, lambda value: value == 0),
    "bad_words_ids": AsPlugin("bad_words", lambda value: {"sequences": value}, lambda value: not value),
    "forced_bos_token_id": AsPlugin("forced_bos", lambda value: {"token_ids": value}),
    "forced_eos_token_id": AsPlugin("forced_eos", lambda value: {"token_ids": value}),
    "exponential_decay_length_penalty": AsPlugin(
        "exponential_decay_length_penalty", lambda value: {"start": value[0], "factor": value[1]}
    ),
    "suppress_tokens": AsPlugin("suppress_tokens", lambda value: {"token_ids": value}, lambda value: not value),
    "begin_suppress_tokens": AsPlugin(
        "begin_suppress_tokens", lambda value: {"token_ids": value}, lambda value: not value
    ),
    "temperature": _sampler("temperature", "temperature", lambda value: value == 1),
    "top_h": _sampler("top_h", "alpha", lambda value: False, rule="transformers"),
    "top_k": _sampler("top_k", "k", lambda value: value == 0),
    "top_p": _sampler("top_p", "p", lambda value: value >= 1),
    "min_p": _sampler("min_p", "p", lambda value: value == 0),
    "typical_p": _sampler("typical", "p", lambda value: value >= 1),
    "epsilon_cutoff": _sampler("epsilon", "epsilon", lambda value: not 0 < value < 1),
    "eta_cutoff": _sampler("eta", "epsilon", lambda value: not 0 < value < 1),
    "prompt_lookup_num_tokens": AsPlugin("prompt_lookup", lambda value: {"length": value}),
    "assistant_early_exit": AsPlugin("layer_skip", lambda value: {"layers": value}),
    # Settings.
    "do_sample": AsSetting("strategy"),
    "num_beams": AsSetting("strategy"),
    "length_penalty": AsSetting("strategy"),
    "early_stopping": AsSetting("strategy"),
    "num_beam_groups": AsSetting("strategy"),
    "diversity_penalty": AsSetting("strategy"),
    "penalty_alpha": AsSetting("strategy"),
    "max_length": AsSetting("limits.max_length"),
    "max_new_tokens": AsSetting("limits.max_new_tokens"),
    "min_length": AsSetting("limits.min_length"),
    "min_new_tokens": AsSetting("limits.min_new_tokens"),
    "max_time": AsSetting("limits.deadline"),
    "stop_strings": AsSetting("limits.stop"),
    "eos_token_id": AsSetting("limits.end_ids"),
    "num_return_sequences": AsSetting("n"),
    # Without bearing on the tokens.
    "use_mtp": Ignored(_SPECULATION),
    "use_cache": Ignored(_CACHE),
    "cache_implementation": Ignored(_CACHE),
    "cache_config": Ignored(_CACHE),
    "max_cache_len": Ignored(_CACHE),
    "prefill_chunk_size": Ignored("prompts are always prefilled in chunks, under engine.token_budget"),
    "low_memory": Ignored(_SPEED),
    "compile_config": Ignored(_SPEED),
    "disable_compile": Ignored(_SPEED),
    "continuous_batching_config": Ignored("batching is always continuous; see the config's engine section"),
    "renormalize_logits": Ignored("every strategy normalises what it reads"),
    "pad_token_id": Ignored("there is no padding"),
    "bos_token_id": Ignored("the tokenizer or the chat template puts it before the prompt"),
    "return_dict_in_generate": Ignored("a result is always complete"),
    "output_scores": Ignored("ask with logprobs: pipeline"),
    "output_logits": Ignored("ask with logprobs: model"),
    "is_assistant": Ignored(_SPECULATION),
    "num_assistant_tokens": Ignored(_SPECULATION),
    "num_assistant_tokens_schedule": Ignored(_SPECULATION),
    "assistant_confidence_threshold": Ignored(_SPECULATION),
    "max_matching_ngram_size": Ignored(_SPECULATION),
    "assistant_lookbehind": Ignored(_SPECULATION),
    "target_lookbehind": Ignored(_SPECULATION),
    "speculation_type": Ignored(_SPECULATION),
    "transformers_version": Ignored("who wrote the file"),
    "_from_model_config": Ignored("who wrote the file"),
    "decoder_start_token_id": Ignored(_ENCODER),
    # Not honoured.
    "remove_invalid_values": Unsupported("a row with NaN fails its request and names who made it", (False,)),
    "token_healing": Unsupported("the prompt is used as it is", (False,)),
    "watermarking_config": Unsupported("name the plugin green_list or tournament, whose keys are their own"),
    "assistant_ensemble_weight": Unsupported("it would change what is drawn; speculation here never does"),
    "output_attentions": Unsupported("attention weights are not returned", (False,)),
    "output_hidden_states": Unsupported("hidden states are for plugins and are not returned", (False,)),
    "encoder_repetition_penalty": Unsupported(_ENCODER, _NEUTRAL_IF_ONE),
    "encoder_no_repeat_ngram_size": Unsupported(_ENCODER, (0,)),
    "dola_layers": Unsupported(f"{_GONE}: name the plugin dola, with the numbers of the layers"),
    "constraints": Unsupported(f"{_GONE}: choose the strategy constrained_beam, with the phrases"),
    "force_words_ids": Unsupported(f"{_GONE}: choose the strategy constrained_beam, with the phrases"),
}
"""Every field of transformers' GenerationConfig, 5.17 to 5.24."""

ARGUMENTS: Mapping[str, Meaning] = {
    "attention_mask": Ignored("there is no padding"),
    "use_model_defaults": Ignored("the model's generation config is always the lowest layer"),
    "synced_gpus": Ignored(_SPEED),
    "trust_remote_code": Ignored("it is a setting of the model"),
    "tokenizer": Ignored("the engine has the model's tokenizer"),
    "assistant_model": Ignored(_SPECULATION),
    "assistant_tokenizer": Ignored(_SPECULATION),
    "logits_processor": Unsupported("wrap each processor as a plugin"),
    "stopping_criteria": Unsupported("wrap each criterion as a plugin"),
    "prefix_allowed_tokens_fn": Unsupported("write it as a constraint plugin"),
    "streamer": Unsupported("use engine.stream"),
    "negative_prompt_ids": Unsupported("name the plugin guidance, with negative_prompt"),
    "negative_prompt_attention_mask": Unsupported("name the plugin guidance, with negative_prompt"),
    "custom_generate": Unsupported("write a strategy"),
    "inputs": Unsupported("give the prompt as token ids"),
    "input_ids": Unsupported("give the prompt as token ids"),
    "inputs_embeds": Unsupported("give the prompt as token ids"),
}
"""Keywords of `generate()` that are no fields of its config."""

RANKS = {meaning.plugin: i for i, meaning in enumerate(m for m in FIELDS.values() if isinstance(m, AsPlugin))}
"""Plugin -> its place in transformers' order."""
SAMPLERS = frozenset(m.plugin for m in FIELDS.values() if isinstance(m, AsPlugin) and m.sampler)
_HF_TOP_K = 50


def read_generation_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read a model's `generation_config.json` without its weights; empty where there is none.

    Args:
        name: a folder or a hub name; a GGUF file has none.
        revision: of the hub's repository.
    """
    path: str | Path | None = Path(name) / "generation_config.json"
    if not Path(name).exists() and "/" in name and not name.endswith(".gguf"):
        from transformers.utils.hub import cached_file  # slow to import, and only the hub needs it

        from unspool.huggingface.hub import check_reachable

        try:
            check_reachable(name, revision)
            path = cached_file(name, "generation_config.json", revision=revision)
        except (OSError, ModelError):
            return {}
    if path is None or not Path(path).is_file():
        return {}
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from error
    if not isinstance(fields, dict):
        raise ConfigError([Problem("", "is no JSON object")], str(path))
    return fields


def generation_fields(config: Any) -> dict[str, Any]:
    """Give what a transformers `GenerationConfig` (or a mapping) sets, by field name."""
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in fields.items() if value is not None}


def model_layer(fields: Mapping[str, Any], registry: Registry) -> Layer:
    """Give the lowest layer: what a model's own generation config says.

    What cannot be honoured is a note and no error: nobody asked for it here.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    notes = _not_honoured(given, registry)
    notes += [f"{name}: no field that transformers documents" for name in given if name not in FIELDS]
    strategy, drawn = _strategy(given, notes)
    data: dict[str, Any] = {"strategy": strategy, **_settings(given)}
    data["plugins"] = _plugins({"top_k": _HF_TOP_K, **given} if drawn else given, drawn, registry)
    while True:
        try:
            return _layer(SOURCE, data, registry, [f"{note} ({SOURCE})" for note in notes])
        except ConfigError as error:
            notes += [f"{problem} is left out" for problem in error.problems]
            data = _without(data, {problem.field for problem in error.problems})


def from_generate_kwargs(
    kwargs: Mapping[str, Any],
    registry: Registry,
    below: Merged | None = None,
    generation: Mapping[str, Any] | None = None,
) -> tuple[Layer, list[str]]:
    """Read the keywords of transformers' `generate()`.

    Args:
        kwargs: keywords, or the fields of a `GenerationConfig` (see `generation_fields`).
        registry: the plugins that may be named.
        below: the layers beneath, merged: what they name already is not named again by a default of transformers.
        generation: the model's own generation config, which fills in what `kwargs` leave open, as in transformers.

    Returns:
        A layer to lay over `below`, and a list of what is not honoured, each with the reason.

    Raises:
        InputError: a keyword that transformers does not know.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    known = {**FIELDS, **ARGUMENTS}
    for name, value in given.items():
        if name not in known:
            raise InputError(name, value, f"no keyword of generate(): {nearest(name, known)}".rstrip(": "))
    missing = _not_honoured(given, registry)
    there = {spec.name for spec in below.plugins} if below else set()
    own = {name: value for name, value in (generation or {}).items() if value is not None}
    data: dict[str, Any] = _settings(given)
    drawn = bool({**own, **given}.get("do_sample", False))
    if any(FIELDS.get(name) == AsSetting("strategy") for name in given):
        data["strategy"], drawn = _strategy({**own, **given}, missing)
    fields = dict(given)
    if "do_sample" in given and drawn:
        left_open = {n: v for n, v in {"top_k": _HF_TOP_K, **own}.items() if _is_sampler(n) and _plugin(n) not in there}
        fields = left_open | fields
    elif idle := [name for name in given if _is_sampler(name) and not drawn and not _neutral(name, given[name])]:
        missing += [f"{name}: it acts under do_sample=True alone" for name in idle]
    data["plugins"] = _plugins(fields, drawn, registry, there)
    return _layer("generate() keywords", data, registry, []), missing


def _layer(source: str, data: Mapping[str, Any], registry: Registry, notes: Sequence[str]) -> Layer:
    settings = validate(Variation, data, registry, source)
    named = {spec.name for spec in settings.plugins or ()}
    return Layer(source, settings, SAMPLERS & named, DETERMINISTIC, RANKS, tuple(notes))


def _strategy(given: Mapping[str, Any], notes: list[str]) -> tuple[Any, bool]:
    """Choose the strategy as `generate()` does, and tell whether samplers act under it."""
    drawn = bool(given.get("do_sample", False))
    width, alpha, candidates = given.get("num_beams", 1), given.get("penalty_alpha", 0), given.get("top_k", _HF_TOP_K)
    if width == 1:
        if alpha and candidates > 1 and not drawn:
            return {"contrastive_search": {"top_k": candidates, "alpha": alpha}}, False
        return ("sample" if drawn else "greedy"), drawn
    if drawn:
        notes.append("do_sample: beams are not sampled; they are searched")
    beam: dict[str, Any] = {"width": width}
    beam |= {name: given[name] for name in ("length_penalty", "early_stopping") if name in given}
    if given.get("num_beam_groups", 1) == 1:
        return {"beam": beam}, False
    groups = {"groups": given["num_beam_groups"], "diversity": given.get("diversity_penalty", 0.0)}
    return {"diverse_beam": beam | groups | {"penalized_scores": True}}, False


def _without(data: Mapping[str, Any], fields: set[str]) -> dict[str, Any]:
    """Leave out the plugins and settings that `fields` name."""
    paths = {tuple(field.split(".")[:2]) for field in fields}
    whole = {path[0] for path in paths if len(path) == 1 or path[0] == "strategy"}
    kept = {name: value for name, value in data.items() if name not in whole}
    kept["plugins"] = [item for item in data["plugins"] if not {("plugins", name) for name in item} & paths]
    kept["limits"] = {name: value for name, value in data.get("limits", {}).items() if ("limits", name) not in paths}
    assert kept != data, fields
    return kept


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for name, value in given.items():
        meaning = FIELDS.get(name)
        if isinstance(meaning, AsSetting) and meaning.setting != "strategy":
            section, _, field = meaning.setting.rpartition(".")
            (limits if section else data)[field] = list(value) if isinstance(value, tuple | set) else value
    # In transformers the number of new tokens goes before the length with the prompt.
    for length, tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if tokens in limits:
            limits.pop(length, None)
    return {**data, "limits": limits} if limits else data


def _plugins(
    given: Mapping[str, Any], drawn: bool, registry: Registry, there: set[str] | None = None
) -> list[dict[str, Any]]:
    """List plugins in transformers' order; a neutral value takes away one that is `there`."""
    plugins: list[dict[str, Any]] = []
    for name, meaning in FIELDS.items():
        if not isinstance(meaning, AsPlugin) or name not in given or (meaning.sampler and not drawn):
            continue
        if meaning.neutral(given[name]):
            plugins += [{meaning.plugin: False}] if meaning.plugin in (there or ()) else []
        elif meaning.plugin in registry:
            plugins.append({meaning.plugin: meaning.params(given[name])})
    return plugins


def _not_honoured(given: Mapping[str, Any], registry: Registry) -> list[str]:
    told: list[str] = []
    for name, value in given.items():
        meaning = FIELDS.get(name) or ARGUMENTS.get(name)
        if isinstance(meaning, Unsupported) and value not in meaning.neutral:
            told.append(f"{name}: {meaning.reason}")
        if isinstance(meaning, AsPlugin) and meaning.plugin not in registry and not meaning.neutral(value):
            told.append(f"{name}: the plugin {meaning.plugin!r} is not installed")
    return told


def _plugin(name: str) -> str:
    meaning = FIELDS[name]
    return meaning.plugin if isinstance(meaning, AsPlugin) else ""


def _is_sampler(name: str) -> bool:
    meaning = FIELDS.get(name)
    return isinstance(meaning, AsPlugin) and meaning.sampler


def _neutral(name: str, value: object) -> bool:
    meaning = FIELDS[name]
    return isinstance(meaning, AsPlugin) and meaning.neutral(value)


def _sequence_biases(value: Any) -> list[tuple[Any, Any]]:
    return [tuple(pair) for pair in (value.items() if isinstance(value, Mapping) else value)]
