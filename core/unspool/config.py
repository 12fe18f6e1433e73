"""A config: which model, one strategy, an ordered list of plugins, limits, and named variations of these.

The models here say what a file may hold and find everything that is wrong with it at once, before any weight is loaded.
How a file, a profile, a request and the model's own defaults are laid over each other stands in `layers.py`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from unspool.errors import ConfigError, Problem
from unspool.pipeline import PluginSpec
from unspool.registry import Registry
from unspool.request import Logprobs
from unspool.spec import Off, format_spec, nearest, parse_spec

PLACEHOLDER = "unspool"
"""In the models' JSON Schema it stands for what depends on the plugins that are installed (see `schema.py`)."""

M = TypeVar("M", bound=BaseModel)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str) -> int:
    """Read a number of bytes such as `2GiB`, `512MB` or `1073741824`, or raise `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or (unit := match[2].upper()) not in _UNITS:
        raise ValueError("a size such as 2GiB, 512MB or a number of bytes")
    return int(float(match[1]) * _UNITS[unit])


@functools.cache
def _installed() -> Registry:
    return Registry.installed()


def _read_spec(value: object, info: ValidationInfo) -> PluginSpec | Off:
    try:
        return parse_spec(value, (info.context or {}).get("registry") or _installed())
    except ConfigError as error:
        raise ValueError(error.problems[0].message) from error


def _read_strategy(value: object, info: ValidationInfo) -> PluginSpec:
    if isinstance(value, Mapping) and len(value) > 1:
        raise ValueError(f"a config has one strategy, not {len(value)} ({', '.join(map(str, value))})")
    spec = _read_spec(value, info)
    if isinstance(spec, Off):
        raise ValueError(f"a strategy cannot be off: name another one instead of {spec.name!r}")
    return spec


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


def _switch(value: object) -> object:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # so YAML reads on and off


def _placeholder(name: str) -> WithJsonSchema:
    return WithJsonSchema({PLACEHOLDER: name})


Strategy = Annotated[PluginSpec, PlainValidator(_read_strategy), PlainSerializer(format_spec), _placeholder("Strategy")]
PluginItem = Annotated[
    PluginSpec | Off, PlainValidator(_read_spec), PlainSerializer(format_spec), _placeholder("Plugin")
]
TokenId = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Quantization = Literal["int8", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4"]
StopString = Annotated[str, Field(min_length=1)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class LimitSettings(_Closed):
    """Where a text ends, whatever the strategy."""

    max_new_tokens: Count | None = Field(default=None, description="Most new tokens, the end token included.")
    max_length: Count | None = Field(default=None, description="The same, counted with the prompt.")
    min_new_tokens: TokenId | None = Field(default=None, description="End tokens are banned before so many new tokens.")
    min_length: TokenId | None = Field(default=None, description="The same, counted with the prompt.")
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="Strings that end the text; they are left out of it."
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="Token ids that end the text besides the model's own end ids."
    )
    end_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="The end ids themselves; by default the model's own."
    )
    ignore_eos: bool | None = Field(default=None, strict=True, description="Do not end at the end ids.")
    deadline: Annotated[float, Field(strict=True, gt=0)] | None = Field(
        default=None, description="Seconds from submission after which a request finishes as it is."
    )


class Variation(_Closed):
    """What a profile may change, and what a request, a command line or a model's own defaults come to."""

    strategy: Strategy | None = Field(default=None, description="The one plugin that chooses tokens.")
    plugins: tuple[PluginItem, ...] | None = Field(
        default=None, description="Plugins in order. One named again is overridden in place, a new one is appended."
    )
    replace_plugins: tuple[PluginItem, ...] | None = Field(
        default=None, alias="plugins!", description="The whole list, instead of the lower layers'."
    )
    limits: LimitSettings = Field(default=LimitSettings(), description="Where a text ends.")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = Field(
        default=None, description="The seed of the run."
    )
    n: Count | None = Field(default=None, description="How many hypotheses to return.")
    logprobs: Logprobs | None = Field(
        default=None, description="Return log-probabilities, of the model or of the pipeline."
    )
    raw: bool | None = Field(default=None, strict=True, description="No chat template for a text prompt.")
    chat: dict[str, Any] | None = Field(default=None, description="Extra arguments of the model's chat template.")

    @model_validator(mode="after")
    def _one_list(self) -> Variation:
        if self.plugins is not None and self.replace_plugins is not None:
            raise ValueError("plugins and plugins! exclude each other")
        return self

    @field_validator("plugins", "replace_plugins")
    @classmethod
    def _no_name_twice(cls, specs: Sequence[PluginSpec | Off] | None) -> Sequence[PluginSpec | Off] | None:
        names = [spec.name for spec in specs or ()]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(doubled)} stands twice")
        return specs


class ModelSettings(_Closed):
    """Which model, and how it is loaded."""

    name: str = Field(default="smollm2", min_length=1, description="A folder, a GGUF file, a hub name, or smollm2.")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the weights."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    quantization: Quantization | None = Field(default=None, description="How the weights are quantized at load.")
    compile: Annotated[Literal["off", "auto", "on"], BeforeValidator(_switch)] = Field(
        default="auto",
        description="Machine code made for this model: auto uses what `unspool compile` or a long run has made. "
        "On a GPU, on runs CUDA graphs.",
    )
    revision: str | None = Field(default=None, description="A branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(
        default=False, strict=True, description="Run model code that comes with the weights."
    )


class EngineSettings(_Closed):
    """What the engine may use. Whatever is left out is chosen from what is free."""

    slots: Count | None = Field(default=None, description="Cache slots in the pool, one a token.")
    memory: str | None = Field(default=None, description="Size of the pool instead of slots, such as 2GiB.")
    token_budget: Count | None = Field(default=None, description="Most tokens that one pass runs.")
    threads: Count | None = Field(default=None, description="CPU threads.")
    max_waiting: Count | None = Field(
        default=None, description="Most requests that wait; beyond it submission is refused."
    )
    max_running: Count | None = Field(default=None, description="Most requests that run at once.")
    prefix_cache: bool = Field(
        default=True, description="Keep prompts that have run, so that those that begin alike are not run again."
    )

    @field_validator("memory", mode="before")
    @classmethod
    def _a_size(cls, value: object) -> object:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or parse_memory(str(value)) < 1:
            raise ValueError("a size such as 2GiB, 512MB or a number of bytes")
        return str(value)

    @model_validator(mode="after")
    def _one_size(self) -> EngineSettings:
        if self.slots is not None and self.memory is not None:
            raise ValueError("slots and memory are two ways of saying the same: give one")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """Give `memory` as a number of bytes."""
        return None if self.memory is None else parse_memory(self.memory)


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Config(Variation):
    """A config file: a model, how to decode with it, and named variations."""

    model: Annotated[ModelSettings, BeforeValidator(_named)] = Field(default=ModelSettings(), description="The model.")
    engine: EngineSettings = Field(default=EngineSettings(), description="Resources.")
    profiles: dict[str, Variation] = Field(default={}, description="Named variations, chosen with --profile.")

    @classmethod
    def parse(cls, data: object, registry: Registry, source: str = "") -> Config:
        """Validate what a file holds, or raise one `ConfigError` with everything that is wrong in its own right."""
        if not isinstance(data, Mapping):
            raise ConfigError([Problem("", f"a config is a mapping of fields to values, not {_shown(data)}")], source)
        return validate(cls, data, registry, source)


def read_config(path: str | Path, registry: Registry) -> Config:
    """Read and validate a config file, YAML or TOML by its suffix, or raise a `ConfigError`."""
    return Config.parse(_load(Path(path)), registry, str(path))


def validate(model: type[M], data: Mapping[str, Any], registry: Registry, source: str = "") -> M:
    """Validate `data`, or raise one `ConfigError` that lists every problem by its dotted field.

    A plugin's parameters are checked as far as they are given: what is missing may come from a lower layer.
    """
    problems = [*_parameter_problems(data, registry)]
    try:
        valid = model.model_validate(data, context={"registry": registry})
    except ValidationError as error:
        problems = [*(_problem(model, found) for found in error.errors()), *problems]
    if problems:
        raise ConfigError(problems, source)
    return valid


def _parameter_problems(data: Mapping[str, Any], registry: Registry, prefix: str = "") -> Iterator[Problem]:
    for field in ("strategy", "plugins", "plugins!"):
        given = data.get(field)
        items = [given] if field == "strategy" else given if isinstance(given, list | tuple) else []
        for item in items:
            with contextlib.suppress(ConfigError):  # what cannot be read at all is found by the model itself
                spec = parse_spec(item, registry)
                if isinstance(spec, PluginSpec):
                    where = f"{prefix}{field}.{spec.name}"
                    yield from _given_parameters(spec, registry.find(spec.name).plugin.Params, where)
    profiles = data.get("profiles")
    for name, profile in profiles.items() if isinstance(profiles, Mapping) else ():
        if isinstance(profile, Mapping):
            yield from _parameter_problems(profile, registry, f"profiles.{name}.")


def _given_parameters(spec: PluginSpec, params: type[BaseModel], where: str) -> Iterator[Problem]:
    try:
        params.model_validate(dict(spec.params))
    except ValidationError as error:
        for found in error.errors():
            if found["type"] != "missing":
                problem = _problem(params, found)
                yield Problem(f"{where}.{problem.field}" if problem.field else where, problem.message)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML forbids and PyYAML overlooks."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[object] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> object:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        loaded = yaml.load(text, Loader=_Loader)
        return {} if loaded is None else loaded
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror}")], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8: {error.reason} at byte {error.start}")], str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem("", f"is not TOML: {error}")], str(path)) from error
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([Problem("", f"is not YAML: {error.problem}{where}")], str(path)) from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ConfigError([Problem("", f"is not YAML: {error}")], str(path)) from error


def _problem(model: type[BaseModel], error: Any) -> Problem:
    where, kind = [str(part) for part in error["loc"]], error["type"]
    field = ".".join(where)
    if kind == "extra_forbidden":
        return Problem(field, _no_such_field(model, where))
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("missing", "value_error"):
        return Problem(field, message)
    return Problem(field, f"{message}, not {_shown(error['input'])}")


def _no_such_field(model: type[BaseModel], where: Sequence[str]) -> str:
    parent, path = model, list(where[:-1])
    while path:
        part = path.pop(0)
        if part == "profiles" and path:
            parent, _ = Variation, path.pop(0)
        elif part in _SECTIONS and issubclass(parent, Variation):
            parent = _SECTIONS[part]
        else:
            return "no such field"
    if issubclass(parent, Variation) and where[-1] in LimitSettings.model_fields:
        return f"no such field: it belongs under limits: limits.{where[-1]}"
    allowed = [field.alias or name for name, field in parent.model_fields.items()]
    return f"no such field: {nearest(where[-1], allowed)}allowed: {', '.join(allowed)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_SECTIONS: dict[str, type[BaseModel]] = {"limits": LimitSettings, "model": ModelSettings, "engine": EngineSettings}
