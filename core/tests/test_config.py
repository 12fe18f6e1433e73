"""Configs: what a file may hold, how layers are laid over each other, and the law that a pipeline describes itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from unspool.config import Config, parse_memory, read_config
from unspool.errors import AdmissionError, ConfigError, InputError
from unspool.layers import Layer
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool.registry import Entry, Registry
from unspool.request import Request
from unspool.resolved import DEFAULT_MAX_NEW_TOKENS, Defaults, check_config, describe, load_defaults, resolve_request
from unspool.schema import config_schema
from unspool.spec import Off, parse_spec


class Greedy(Plugin):
    """Stand in for the strategy of that name."""

    row_local = True

    @hookimpl
    def select(self, step: Any, logits: Any) -> Any:
        """Choose nothing: these tests never run."""


class Beam(Greedy):
    """A strategy with parameters."""

    class Params(Parameters):
        """Its width and more."""

        main: ClassVar[str | None] = "width"
        width: int = Field(4, ge=1)
        length_penalty: float = 1.0


class Scale(Plugin):
    """A plugin with one parameter, which is its main one."""

    class Params(Parameters):
        """The scale."""

        factor: float = per_request(1.0, gt=0, le=10)


class Window(Plugin):
    """A plugin with several parameters, one of them required, none of them main."""

    class Params(Parameters):
        """The window."""

        size: int = Field(ge=1)
        label: str = "a"


class Bias(Plugin):
    """A plugin whose main parameter is a mapping."""

    class Params(Parameters):
        """The biases."""

        biases: dict[int, float]


class Switch(Plugin):
    """A plugin whose main parameter is a bool, so `off` is a value."""

    class Params(Parameters):
        """The switch."""

        on: bool = True


PLUGINS: dict[str, type[Plugin]] = {
    "greedy": Greedy,
    "beam": Beam,
    "scale": Scale,
    "window": Window,
    "bias": Bias,
    "switch": Switch,
}
REGISTRY = Registry([]).with_plugins(PLUGINS)


def parse(data: object) -> Config:
    return Config.parse(data, REGISTRY, "test")


def defaults(data: object, **options: Any) -> Defaults:
    return Defaults(parse(data), REGISTRY, **options)


def problems(data: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(data)
    return {problem.field: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("written", "params"),
    [
        ("scale", {}),
        ("scale:0.5", {"factor": 0.5}),
        ("scale:factor=0.5", {"factor": 0.5}),
        ({"scale": 0.5}, {"factor": 0.5}),
        ({"scale": {"factor": 0.5}}, {"factor": 0.5}),
        ({"scale": None}, {}),
        ("window:size=3,label='a,b'", {"size": 3, "label": "a,b"}),
        ("window: size = 3 , label = [x, y]", {"size": 3, "label": ["x", "y"]}),
        ("bias:{5: 1.5, 7: -2}", {"biases": {5: 1.5, 7: -2}}),
        ("bias:biases={5: 1.5}", {"biases": {5: 1.5}}),
        ({"bias": {5: 1.5}}, {"biases": {5: 1.5}}),
        ({"bias": {"biases": {5: 1.5}}}, {"biases": {5: 1.5}}),
        ({"switch": False}, {"on": False}),
        (PluginSpec("scale", {"factor": 2}), {"factor": 2}),
    ],
)
def test_every_way_of_writing_a_plugin_gives_named_parameters(written: object, params: dict[str, Any]) -> None:
    spec = parse_spec(written, REGISTRY)
    assert isinstance(spec, PluginSpec)
    assert dict(spec.params) == params


@pytest.mark.parametrize("written", [{"scale": False}, "scale:off", "scale:false"])
def test_off_takes_a_plugin_away(written: object) -> None:
    assert parse_spec(written, REGISTRY) == Off("scale")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("scael", "did you mean 'scale'"),
        ("window:3", "takes no bare value"),
        ("window:size=3,4", "write name:value or name:key=value"),
        ("window:size=1,size=2", "stands twice"),
        ("bias:{5: ", "cannot read the value"),
        (3, "a plugin is a name"),
        ({"scale": 1, "window": 2}, "one name is wanted"),
        ({}, "one name is wanted"),
        ({"window": {1: 2}}, "name is a string"),
    ],
)
def test_a_plugin_written_wrongly_is_explained(written: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(written, REGISTRY)


def test_everything_wrong_with_a_config_is_said_at_once() -> None:
    found = problems(
        {
            "modle": "x",
            "strategy": {"beam": {"width": 0, "widht": 3}},
            "plugins": ["scael", {"scale": 99}, 3],
            "limits": {"max_new_token": 3, "stop": [""], "deadline": 0},
            "max_new_tokens": 5,
            "seed": "seven",
            "engine": {"slots": 1, "memory": "2GiB"},
            "profiles": {"limits": {"sed": 1, "limits": {"stpo": 1}, "plugins": [{"scale": -1}]}},
        }
    )
    assert "did you mean 'model'" in found["modle"]
    assert "greater than or equal to 1" in found["strategy.beam.width"]
    assert "did you mean 'width'" in found["strategy.beam.widht"]
    assert "did you mean 'scale'" in found["plugins.0"]
    assert "less than or equal to 10, not 99" in found["plugins.scale.factor"]
    assert "not 3" in found["plugins.2"]
    assert "did you mean 'max_new_tokens'" in found["limits.max_new_token"]
    assert "at least 1 character" in found["limits.stop.0"]
    assert "limits.max_new_tokens" in found["max_new_tokens"]
    assert {"limits.deadline", "seed", "engine"} <= found.keys()
    assert "did you mean 'seed'" in found["profiles.limits.sed"]
    assert "did you mean 'stop'" in found["profiles.limits.limits.stpo"]
    assert "profiles.limits.plugins.scale.factor" in found


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ({"strategy": {"beam": {}, "greedy": {}}}, "strategy", "one strategy, not 2"),
        ({"strategy": {"beam": False}}, "strategy", "cannot be off"),
        ({"plugins": ["scale", {"scale": 2}]}, "plugins", "scale stands twice"),
        ({"plugins": [], "plugins!": []}, "", "exclude each other"),
        ({"limits": {"max_new_tokens": True}}, "limits.max_new_tokens", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"engine": {"memory": "much"}}, "engine.memory", "a size such as 2GiB"),
        ({"model": {"dtype": "float12"}}, "model.dtype", "float32"),
        ([], "", "a config is a mapping"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(data: object, field: str, message: str) -> None:
    assert message in problems(data)[field]


def test_two_strategies_are_refused() -> None:
    [problem] = check_config(parse({"strategy": "greedy", "plugins": ["beam"]}), REGISTRY)
    assert "'beam' is a strategy, and 'greedy' is one already" in problem.message


def test_checking_a_config_looks_into_every_profile() -> None:
    config = parse({"strategy": "greedy", "plugins": ["window"], "profiles": {"odd": {"strategy": "scale"}}})
    found = {problem.field: problem.message for problem in check_config(config, REGISTRY)}
    assert "required" in found["plugins.window.size"]
    assert "required" not in str([m for f, m in found.items() if f.startswith("profiles")])


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_yaml_and_toml_say_the_same(tmp_path: Any, suffix: str) -> None:
    text = {
        "yaml": "model: smollm2\nstrategy: {beam: {width: 2}}\nplugins:\n  - scale: 0.5\n  - window: {size: 3}\n"
        'limits: {max_new_tokens: 9, stop: ["\\n\\n"]}\nprofiles:\n  wide: {strategy: beam:8}\n',
        "toml": 'model = "smollm2"\nplugins = [{scale = 0.5}, {window = {size = 3}}]\nstrategy = {beam = {width = 2}}\n'
        'limits = {max_new_tokens = 9, stop = "\\n\\n"}\n[profiles.wide]\nstrategy = {beam = 8}\n',
    }[suffix]
    path = tmp_path / f"config.{suffix}"
    path.write_text(text)
    config = read_config(path, REGISTRY)
    assert config.strategy == PluginSpec("beam", {"width": 2})
    assert config.plugins == (PluginSpec("scale", {"factor": 0.5}), PluginSpec("window", {"size": 3}))
    assert config.limits.stop == ("\n\n",)
    assert config.profiles["wide"].strategy == PluginSpec("beam", {"width": 8})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"strategy: [", "is not YAML"),
        ("a.yaml", b"strategy: greedy\nstrategy: beam\n", "'strategy' stands twice at line 2"),
        ("a.yaml", b"model: \xff\xfe", "is not UTF-8"),
        ("a.yaml", b"- greedy", "a config is a mapping"),
        ("a.toml", b"strategy = ", "is not TOML"),
    ],
)
def test_an_unreadable_file_is_explained(tmp_path: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(path, REGISTRY)


def test_a_missing_file_and_a_folder_are_explained(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml", REGISTRY)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path, REGISTRY)


def test_an_empty_file_is_an_empty_config(tmp_path: Any) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert read_config(path, REGISTRY) == Config()


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("512 MB", 512 * 10**6), ("1.5kib", 1536), ("77", 77)])
def test_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_memory(text) == size


def test_each_layer_overrides_the_one_below_and_every_value_knows_its_source() -> None:
    below = defaults(
        {
            "strategy": "beam:2",
            "plugins": [{"scale": 2}, {"window": {"size": 3}}],
            "limits": {"max_new_tokens": 10, "stop": "a"},
            "profiles": {"wide": {"strategy": {"beam": {"width": 8}}, "plugins": [{"window": {"label": "b"}}]}},
        },
        source="file",
        overrides=(Layer("command line", parse({"plugins": ["switch"], "n": 2})),),
    )
    request = Request(prompt="x", profile="wide", plugins=[{"scale": 3}], max_new_tokens=4)
    resolved = resolve_request(below, request)
    assert describe(resolved.pipeline) == {
        "strategy": {"beam": {"width": 8, "length_penalty": 1.0}},
        "plugins": [{"scale": {"factor": 3.0}}, {"window": {"size": 3, "label": "b"}}, {"switch": {"on": True}}],
    }
    sources = resolved.provenance
    assert sources["strategy.width"] == sources["plugins.window.label"] == "profile wide"
    assert sources["plugins.window.size"] == sources["limits.stop"] == "file"
    assert sources["plugins.switch"] == sources["n"] == "command line"
    assert sources["plugins.scale.factor"] == sources["limits.max_new_tokens"] == "request"
    limits = resolved.limits(5)
    assert (limits.max_new_tokens, limits.stop, resolved.n) == (4, ("a",), 2)


def test_another_strategy_takes_the_place_and_forgets_the_parameters_of_the_first() -> None:
    resolved = resolve_request(defaults({"strategy": {"beam": {"width": 8}}}), Request(prompt="x", strategy="greedy"))
    assert describe(resolved.pipeline)["strategy"] == "greedy"
    assert "strategy.width" not in resolved.provenance


def test_the_list_is_replaced_on_demand_and_one_plugin_is_taken_away_by_off() -> None:
    below = defaults({"plugins": ["scale", "switch"], "profiles": {"bare": {"plugins!": ["switch"]}}})
    assert [p.name for p in resolve_request(below, Request(prompt="x", profile="bare")).plugins] == ["switch"]
    assert [p.name for p in resolve_request(below, Request(prompt="x", plugins=[{"scale": False}])).plugins] == [
        "switch"
    ]
    replaced = resolve_request(below, Request(prompt="x", plugins=["scale:3"], replace_plugins=True))
    assert [p.name for p in replaced.plugins] == ["scale"]


def test_a_plugin_replaced_or_added_keeps_the_order_of_the_config() -> None:
    below = defaults({"plugins": ["scale", "switch"]})
    resolved = resolve_request(below, Request(prompt="x", plugins=["window:size=1", "scale:2"]))
    assert [p.name for p in resolved.plugins] == ["scale", "switch", "window"]


def test_a_problem_that_layers_make_together_names_the_source() -> None:
    with pytest.raises(
        ConfigError, match=r"limits.min_new_tokens: at most max_new_tokens \(3\), not 9 \(from config\)"
    ):
        resolve_request(defaults({"limits": {"min_new_tokens": 9}}), Request(prompt="x", max_new_tokens=3))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no profile 'carful': did you mean 'careful'"):
        resolve_request(defaults({"profiles": {"careful": {}}}), Request(prompt="x", profile="carful"))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "9"}, "max_new_tokens"),
        ({"stop": [3]}, "stop.0"),
        ({"n": True}, "n"),
        ({"logprobs": "all"}, "logprobs"),
        ({"plugins": "scale"}, "plugins"),
        ({"plugins": [{"scale": "much"}]}, "plugins.scale.factor"),
        ({"strategy": 3}, "strategy"),
        ({"profile": 3}, "profile"),
    ],
)
def test_a_wrong_field_of_a_request_is_named_as_the_user_wrote_it(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_request(defaults({}), Request(prompt="x", **fields))
    assert field in [problem.field for problem in caught.value.problems]


def test_equal_requests_share_one_pipeline_whatever_their_limits() -> None:
    below = defaults({})
    one = resolve_request(below, Request(prompt="x", plugins=["scale:2"], max_new_tokens=1, seed=1))
    two = resolve_request(below, Request(prompt="y", plugins=["scale:2"], max_new_tokens=2, seed=2))
    assert one.pipeline is two.pipeline
    assert (one.limits(1).max_new_tokens, two.limits(1).max_new_tokens) == (1, 2)


def test_an_explicit_limit_beyond_the_window_is_refused_and_the_default_is_clamped() -> None:
    free = resolve_request(defaults({}), Request(prompt="x"))
    assert free.limits(10).max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    assert free.limits(10, window=30).max_new_tokens == 20
    asked = resolve_request(defaults({}), Request(prompt="x", max_new_tokens=21))
    with pytest.raises(AdmissionError, match="at most 20: the window is 30, the prompt 10 tokens"):
        asked.limits(10, window=30)
    with pytest.raises(AdmissionError, match="fewer than the model's window of 30"):
        free.limits(30, window=30)


def test_the_model_s_own_limit_is_clamped_to_the_window_like_the_default() -> None:
    resolved = resolve_request(defaults({}, generation={"max_new_tokens": 500}), Request(prompt="x"))
    assert resolved.limits(10, window=30).max_new_tokens == 20


def test_a_length_counted_with_the_prompt_and_one_without_override_each_other() -> None:
    below = defaults({"limits": {"max_length": 20, "min_length": 12}})
    resolved = resolve_request(below, Request(prompt="x"))
    assert (resolved.limits(5).max_new_tokens, resolved.limits(5).min_new_tokens) == (15, 7)
    assert resolve_request(below, Request(prompt="x", max_new_tokens=3)).limits(5).max_new_tokens == 3
    with pytest.raises(InputError, match="more than the prompt's 25 tokens"):
        resolved.limits(25)


def test_end_ids_are_the_model_s_own_until_overridden_or_ignored() -> None:
    below = defaults({}, generation={"eos_token_id": [1, 2]})
    assert resolve_request(below, Request(prompt="x", stop_token_ids=[2, 7])).end_ids == (1, 2, 7)
    assert resolve_request(below, Request(prompt="x", stop_token_ids=[7], ignore_eos=True)).end_ids == (7,)
    other = defaults({"limits": {"end_ids": 5}}, generation={"eos_token_id": 1})
    assert resolve_request(other, Request(prompt="x")).end_ids == (5,)


def test_chat_arguments_are_laid_over_each_other_by_name() -> None:
    below = defaults({"chat": {"enable_thinking": False, "a": 1}})
    assert resolve_request(below, Request(prompt="x", chat={"a": 2})).chat == {"enable_thinking": False, "a": 2}


def test_defaults_come_from_nothing_a_config_or_a_file(tmp_path: Any) -> None:
    assert resolve_request(load_defaults(None, REGISTRY), Request(prompt="x")).strategy.name == "greedy"
    assert load_defaults(parse({"seed": 3}), REGISTRY).config.seed == 3
    path = tmp_path / "c.yaml"
    path.write_text("seed: 4")
    below = load_defaults(path, REGISTRY)
    assert load_defaults(below, REGISTRY) is below
    assert resolve_request(below, Request(prompt="x")).provenance["seed"] == str(path)


SPECS = {
    "scale": st.fixed_dictionaries({"factor": st.floats(0.125, 10, width=16)}),
    "window": st.fixed_dictionaries({"size": st.integers(1, 9), "label": st.text(max_size=3)}),
    "bias": st.fixed_dictionaries(
        {"biases": st.dictionaries(st.integers(0, 9).map(str), st.floats(-4, 4, width=16), min_size=1)}
    ),
    "switch": st.fixed_dictionaries({"on": st.booleans()}),
}
SPECS["window"].validate()  # on a fresh machine Hypothesis makes its Unicode tables: seconds that are no draw's
STRATEGIES = st.one_of(
    st.just("greedy"),
    st.fixed_dictionaries(
        {"beam": st.fixed_dictionaries({"width": st.integers(1, 9), "length_penalty": st.floats(-2, 2, width=16)})}
    ),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(SPECS)), unique=True))
    return {"strategy": draw(STRATEGIES), "plugins": [{name: draw(SPECS[name])} for name in names]}


@given(configs())
def test_config_to_pipeline_to_config_is_the_identity(data: dict[str, Any]) -> None:
    config = parse(data)
    assert config.strategy is not None
    specs = [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)]
    pipeline = build_pipeline(config.strategy, specs, REGISTRY)
    described = describe(pipeline)
    assert json.loads(json.dumps(described)) == data
    again = parse(described)
    assert again.strategy is not None
    rebuilt = build_pipeline(again.strategy, [s for s in again.plugins or () if isinstance(s, PluginSpec)], REGISTRY)
    assert rebuilt.key == pipeline.key


@given(configs(), configs())
def test_laying_a_config_over_another_and_over_itself_changes_nothing_more(
    lower: dict[str, Any], upper: dict[str, Any]
) -> None:
    below = replace(defaults(lower), overrides=(Layer("once", parse(upper)),))
    twice = replace(below, overrides=(*below.overrides, Layer("twice", parse(upper))))
    request = Request(prompt="x")
    assert describe(resolve_request(below, request).pipeline) == describe(resolve_request(twice, request).pipeline)


def test_the_schema_covers_every_installed_plugin_and_leaves_out_broken_ones() -> None:
    schema = config_schema(Registry([*REGISTRY, Entry("lost", "no_such_module:Lost", "lost")]))
    text = json.dumps(schema)
    assert all(f"{name}.params" in schema["$defs"] for name in PLUGINS)
    assert "lost" not in text
    strategies, plugins = schema["$defs"]["Strategy"]["anyOf"], schema["$defs"]["Plugin"]["anyOf"]
    assert strategies[0] == {"enum": ["greedy", "beam"]}
    assert plugins[0] == {"enum": ["scale", "window", "bias", "switch"]}
    assert set(_references(schema)) <= {f"#/$defs/{name}" for name in schema["$defs"]}


def _references(part: Any) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [found for value in part.values() for found in _references(value)]
    return [found for item in part for found in _references(item)] if isinstance(part, list) else []
