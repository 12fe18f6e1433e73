"""Transformers' generation config: every field has a meaning here, and the model's defaults are what it would use."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from unspool.config import Config
from unspool.errors import ConfigError, InputError
from unspool.generation_config import (
    ARGUMENTS,
    FIELDS,
    SOURCE,
    AsPlugin,
    AsSetting,
    Ignored,
    Unsupported,
    from_generate_kwargs,
    generation_fields,
    model_layer,
    read_generation_config,
)
from unspool.pipeline import PluginSpec
from unspool.plugin import Parameters, Plugin
from unspool.registry import Registry
from unspool.request import Request
from unspool.resolved import Defaults, Resolved, resolve_request

MAKE: Any = transformers.GenerationConfig  # it has no types
REGISTRY = Registry.installed()
PLUGINS = {meaning.plugin for meaning in FIELDS.values() if isinstance(meaning, AsPlugin)}
pytestmark = pytest.mark.skipif(not PLUGINS <= {e.name for e in REGISTRY}, reason="needs unspool-sample and -penalties")

VALUES: dict[str, Any] = {
    "guidance_scale": 1.5,
    "sequence_bias": [[[5, 6], -2.0]],
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[4], [5, 6]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": [2, 3],
    "exponential_decay_length_penalty": (5, 1.2),
    "suppress_tokens": [8],
    "begin_suppress_tokens": [9],
    "temperature": 0.7,
    "top_h": 0.4,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 1e-3,
    "prompt_lookup_num_tokens": 10,
    "assistant_early_exit": 4,
}


def resolved(generation: dict[str, Any], config: dict[str, Any] | None = None, **request: Any) -> Resolved:
    defaults = Defaults(Config.parse(config or {}, REGISTRY), REGISTRY, generation)
    return resolve_request(defaults, Request(prompt="x", **request))


def called(
    generation: dict[str, Any], config: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[Resolved, list[str]]:
    defaults = Defaults(Config.parse(config or {}, REGISTRY), REGISTRY, generation)
    request = Request(prompt="x")
    below = resolve_request(defaults, request).merged
    layer, missing = from_generate_kwargs(kwargs, REGISTRY, below, generation)
    return resolve_request(defaults, request, layer), missing


def names(found: Resolved) -> list[str]:
    return [spec.name for spec in found.plugins]


def test_every_field_of_a_generation_config_has_a_meaning() -> None:
    fields = {name for name in vars(MAKE()) if name not in ("_original_object_hash", "_mask_length")}
    assert fields <= FIELDS.keys(), f"no meaning: {sorted(fields - FIELDS.keys())}"


def test_every_field_that_is_not_honoured_says_why() -> None:
    for meanings in (FIELDS, ARGUMENTS):
        for meaning in meanings.values():
            assert isinstance(meaning, AsPlugin | AsSetting) or len(meaning.reason) > 10


def test_every_field_that_is_a_plugin_was_tried_here_and_gives_valid_parameters() -> None:
    assert VALUES.keys() == {name for name, meaning in FIELDS.items() if isinstance(meaning, AsPlugin)}
    found = resolved({"do_sample": True, **VALUES})
    assert names(found) == [meaning.plugin for meaning in FIELDS.values() if isinstance(meaning, AsPlugin)]
    assert not found.notes


def test_the_plugins_stand_in_the_order_of_transformers_processors() -> None:
    import torch
    from transformers.generation.utils import GenerationMixin

    config = MAKE(do_sample=True, max_length=20, **VALUES)
    config._eos_token_tensor = torch.tensor([2])
    model: Any = type("Model", (), {"config": type("Config", (), {"is_encoder_decoder": False})()})()
    model._merge_criteria_processor_list = lambda default, custom: default
    theirs = GenerationMixin._get_logits_processor(model, config, input_ids_seq_length=3, device="cpu")
    words = {
        "norepeatngram": "no_repeat_ngram",
        "nobadwords": "bad_words",
        "suppresstokensatbegin": "begin_suppress_tokens",
        "unbatchedclassifierfreeguidance": "guidance",
    }
    theirs_names = [type(p).__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for p in theirs]
    ours = [words.get(n.lower(), n.lower()).replace("_", "").replace("token", "") for n in theirs_names]
    drafters = {"prompt_lookup", "layer_skip"}  # which are no processors
    said = [name for name in names(resolved({"do_sample": True, **VALUES})) if name not in drafters]
    assert ours == [name.replace("_", "").replace("token", "") for name in said]


def test_no_generation_config_is_greedy_and_do_sample_samples_with_transformers_top_k() -> None:
    assert resolved({}).strategy.name == "greedy"
    sampled = resolved({"do_sample": True, "temperature": 0.6})
    assert sampled.strategy.name == "sample"
    assert {s.name: dict(s.params) for s in sampled.plugins} == {
        "temperature": {"temperature": 0.6},
        "top_k": {"k": 50},
    }
    assert "top_k" not in names(resolved({"do_sample": True, "top_k": 0}))
    assert names(resolved({"temperature": 0.6, "top_p": 0.5})) == []


def test_values_that_change_nothing_name_no_plugin() -> None:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    neutral |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "num_beam_groups": 1}
    found = resolved({"do_sample": True, **neutral})
    assert names(found) == []
    assert not found.notes


def test_limits_ends_and_counts_are_read() -> None:
    fields = {"max_length": 30, "min_new_tokens": 2, "max_time": 1.5, "stop_strings": "END", "eos_token_id": [1, 2]}
    found = resolved({**fields, "num_return_sequences": 3})
    limits = found.limits(10)
    assert (limits.max_new_tokens, limits.min_new_tokens, limits.deadline, limits.stop) == (20, 2, 1.5, ("END",))
    assert (found.end_ids, found.n) == ((1, 2), 3)
    assert resolved({"max_length": 30, "max_new_tokens": 4}).limits(10).max_new_tokens == 4


def test_a_model_s_short_max_length_does_not_refuse_a_longer_prompt() -> None:
    assert resolved({"max_length": 20}).limits(50, window=100).max_new_tokens == 50


def test_an_explicit_greedy_drops_the_model_s_samplers_and_says_so() -> None:
    model = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    found = resolved(model, {"strategy": "greedy"})
    assert names(found) == ["repetition_penalty"]
    [note] = found.notes
    assert note == f"temperature, top_k, top_p of {SOURCE} left out: greedy (config) does not sample"
    kept = resolved(model, {"strategy": "greedy", "plugins": [{"top_p": 0.5}]})
    assert names(kept) == ["repetition_penalty", "top_p"]


def test_another_drawing_strategy_keeps_the_model_s_samplers() -> None:
    class Draws(Plugin):
        row_local = True

        def select(self, step: Any, logits: Any) -> None: ...

    registry = REGISTRY.with_plugins({"draws": Draws})
    defaults = Defaults(Config(), registry, {"do_sample": True, "temperature": 0.6})
    assert names(resolve_request(defaults, Request(prompt="x", strategy="draws"))) == ["temperature", "top_k"]


def test_what_a_model_asks_for_and_cannot_have_is_a_note_and_no_error() -> None:
    found = resolved(
        {"dola_layers": "low", "token_healing": True, "own_field": 1, "do_sample": True, "temperature": -3.0}
    )
    text = "\n".join(found.notes)
    for name in ("dola_layers", "token_healing", "own_field", "temperature"):
        assert name in text
    assert names(found) == ["top_k"]


def test_a_plugin_that_is_not_installed_is_a_note() -> None:
    layer = model_layer({"repetition_penalty": 1.2}, Registry(e for e in REGISTRY if e.name != "repetition_penalty"))
    assert "not installed" in layer.notes[0]
    assert layer.settings.plugins == ()


def test_beams_choose_the_beam_strategy_where_it_is_installed() -> None:
    class Beam(Plugin):
        class Params(Parameters):
            width: int
            length_penalty: float = 1.0

        def select(self, step: Any, logits: Any) -> None: ...

    with_beam = REGISTRY.with_plugins({"beam": Beam})
    strategy = model_layer({"num_beams": 4, "length_penalty": 2.0, "do_sample": True}, with_beam).settings.strategy
    assert strategy == PluginSpec("beam", {"width": 4, "length_penalty": 2.0})
    without = Defaults(Config(), Registry(e for e in REGISTRY if e.name != "beam"), {"num_beams": 4})
    assert resolve_request(without, Request(prompt="x", strategy="greedy")).strategy.name == "greedy"
    with pytest.raises(ConfigError, match="strategy: name one; strategy: no plugin 'beam'"):
        resolve_request(without, Request(prompt="x"))


@pytest.mark.parametrize(
    ("keywords", "strategy"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, {"contrastive_search": {"top_k": 4, "alpha": 0.6}}),
        ({"penalty_alpha": 0.6}, {"contrastive_search": {"top_k": 50, "alpha": 0.6}}),
        ({"penalty_alpha": 0.6, "top_k": 1}, {"greedy": {}}),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": True}, {"sample": {}}),
        (
            {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "early_stopping": True},
            {
                "diverse_beam": {
                    "width": 6,
                    "groups": 3,
                    "diversity": 0.5,
                    "early_stopping": True,
                    "penalized_scores": True,
                }
            },
        ),
        ({"num_beams": 6, "num_beam_groups": 1}, {"beam": {"width": 6}}),
    ],
)
def test_keywords_that_transformers_threw_out_choose_the_strategies_of_ours(
    keywords: dict[str, Any], strategy: dict[str, Any]
) -> None:
    found, _ = called({}, **keywords)
    ((name, params),) = strategy.items()
    assert found.strategy == PluginSpec(name, params)
    assert resolved(keywords).strategy.name == name


def test_keywords_of_generate_override_the_model_s_and_keep_its_order() -> None:
    model = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    found, missing = called(model, temperature=0.3, bad_words_ids=[[3]], max_new_tokens=7)
    assert names(found) == ["bad_words", "temperature", "top_k", "top_p"]
    assert found.plugins[1].params == {"temperature": 0.3}
    assert found.limits(1).max_new_tokens == 7
    assert missing == []


def test_keywords_of_generate_turn_sampling_on_and_off_as_transformers_does() -> None:
    off, _ = called({"do_sample": True, "temperature": 0.6}, do_sample=False)
    assert (off.strategy.name, names(off)) == ("greedy", [])
    on, _ = called({"temperature": 0.6}, do_sample=True)
    assert (on.strategy.name, names(on)) == ("sample", ["temperature", "top_k"])
    none, _ = called({"do_sample": True, "top_p": 0.6}, top_p=1.0, top_k=0)
    assert names(none) == []


def test_a_default_of_transformers_does_not_override_what_the_user_s_config_names() -> None:
    found, _ = called({}, {"plugins": [{"top_k": 5}]}, do_sample=True)
    assert [dict(s.params) for s in found.plugins] == [{"k": 5}]


def test_what_generate_would_ignore_or_we_cannot_do_is_listed() -> None:
    _, missing = called({}, temperature=0.5, streamer=object(), dola_layers=[2], use_cache=True)
    assert [line.partition(":")[0] for line in missing] == ["streamer", "dola_layers", "temperature"]


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        from_generate_kwargs({"temperatur": 1}, REGISTRY)


def test_a_generation_config_object_is_read_like_keywords() -> None:
    config = MAKE(do_sample=True, top_p=0.5, max_new_tokens=3)
    found, missing = called({}, **generation_fields(config))
    assert names(found) == ["top_k", "top_p"]
    assert missing == []


def test_a_folder_s_generation_config_is_read_without_the_weights(tmp_path: Any) -> None:
    assert read_generation_config(str(tmp_path)) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    assert read_generation_config(str(tmp_path)) == {"top_k": 3}
    assert read_generation_config("smollm2") == {}


def test_ignored_and_unsupported_are_told_apart() -> None:
    assert isinstance(FIELDS["use_cache"], Ignored)
    assert isinstance(FIELDS["token_healing"], Unsupported)
