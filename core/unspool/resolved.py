"""A request resolved: the checked pipeline that decodes it, its limits, and where each value comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from unspool.config import Config, LimitSettings, Variation, read_config, validate
from unspool.errors import AdmissionError, ConfigError, InputError, Problem
from unspool.generation_config import SOURCE as MODEL
from unspool.generation_config import model_layer
from unspool.layers import Layer, Merged, merge, overlay
from unspool.pipeline import Pipeline, PluginSpec, build_pipeline
from unspool.registry import Registry
from unspool.request import Limits, Logprobs, Request
from unspool.spec import format_spec, nearest

DEFAULT_MAX_NEW_TOKENS = 256
_CACHED = 4096


@dataclass(frozen=True, eq=False)
class Resolved:
    """How one request is decoded: a checked pipeline, limits, and where each value comes from."""

    merged: Merged
    pipeline: Pipeline

    @property
    def strategy(self) -> PluginSpec:
        """Give the strategy as the layers name it."""
        assert self.merged.settings.strategy is not None
        return self.merged.settings.strategy

    @property
    def plugins(self) -> tuple[PluginSpec, ...]:
        """Give the plugins in order, as the layers name them."""
        return self.merged.plugins

    @property
    def parameters(self) -> Mapping[str, BaseModel]:
        """Map each plugin's name to this request's own validated parameters."""
        return self.pipeline.parameters

    @property
    def seed(self) -> int | None:
        """Give the seed of the run; a request's own is `request.seed`."""
        return self.merged.settings.seed

    @property
    def n(self) -> int:
        """Say how many hypotheses to return."""
        return self.merged.settings.n or 1

    @property
    def logprobs(self) -> Logprobs | None:
        """Say which log-probabilities to return."""
        return self.merged.settings.logprobs

    @property
    def raw(self) -> bool:
        """Tell whether a text prompt goes without the chat template."""
        return bool(self.merged.settings.raw)

    @property
    def chat(self) -> Mapping[str, Any]:
        """Give extra arguments of the chat template."""
        return self.merged.settings.chat or {}

    @property
    def provenance(self) -> Mapping[str, str]:
        """Map each dotted field that somebody gave to its source."""
        return self.merged.provenance

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what was dropped or could not be honoured, and why."""
        return self.merged.notes

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Give the token ids that end a text: the model's own unless ignored, and the stop ids."""
        limits = self.merged.settings.limits
        own = () if limits.ignore_eos else limits.end_ids or ()
        return tuple(dict.fromkeys((*own, *(limits.stop_token_ids or ()))))

    def limits(self, prompt_length: int, window: int | None = None) -> Limits:
        """Give the limits for a prompt of so many tokens.

        Raises:
            AdmissionError: the prompt, or an explicit `max_new_tokens` beside it, does not fit into `window`.
            InputError: an explicit `max_length` leaves no room for a new token.
        """
        given = self.merged.settings.limits
        if window is not None and prompt_length >= window:
            raise AdmissionError("prompt", f"{prompt_length} tokens", f"fewer than the model's window of {window}")
        longest, explicit = self._longest(prompt_length)
        if window is not None and prompt_length + longest > window:
            if explicit:
                allowed = f"at most {window - prompt_length}: the window is {window}, the prompt {prompt_length} tokens"
                raise AdmissionError("max_new_tokens", longest, allowed)
            longest = window - prompt_length
        shortest = given.min_new_tokens
        if shortest is None:
            shortest = max(0, (given.min_length or 0) - prompt_length)
        return Limits(longest, min(shortest, longest), given.stop or (), given.deadline)

    def _longest(self, prompt_length: int) -> tuple[int, bool]:
        """Say how many new tokens are allowed, and whether a user said so rather than the model's own config."""
        given = self.merged.settings.limits
        if given.max_new_tokens is not None:
            return given.max_new_tokens, self.provenance["limits.max_new_tokens"] != MODEL
        if given.max_length is not None:
            explicit = self.provenance["limits.max_length"] != MODEL
            if given.max_length > prompt_length:
                return given.max_length - prompt_length, explicit
            if explicit:
                raise InputError("max_length", given.max_length, f"more than the prompt's {prompt_length} tokens")
        return DEFAULT_MAX_NEW_TOKENS, False


@dataclass(frozen=True, eq=False)
class Defaults:
    """What holds for every request of an engine before the request itself is read.

    Args:
        config: the config file, or an empty one.
        registry: the plugins that may be named.
        generation: the model's own generation config, by transformers' field names.
        source: what to call `config` when saying where a value comes from.
        profile: the profile for requests that name none.
        overrides: what stands above profiles: the command line.
    """

    config: Config
    registry: Registry
    generation: Mapping[str, Any] = field(default_factory=dict)
    source: str = "config"
    profile: str | None = None
    overrides: tuple[Layer, ...] = ()

    def layers(self, profile: str | None = None) -> list[Layer]:
        """Lay out everything below a request, lowest first, or raise a `ConfigError` for an unknown profile."""
        layers = [model_layer(self.generation, self.registry), Layer(self.source, self.config)]
        if (name := profile if profile is not None else self.profile) is not None:
            layers.append(Layer(f"profile {name}", self._profile(name)))
        return [*layers, *self.overrides]

    def _profile(self, name: str) -> Variation:
        profiles = self.config.profiles
        if not isinstance(name, str) or name not in profiles:
            known = f"profiles: {', '.join(profiles)}" if profiles else "the config has none"
            raise ConfigError([Problem("profile", f"no profile {name!r}: {nearest(name, profiles)}{known}")])
        return profiles[name]

    @cached_property
    def _resolved(self) -> dict[str, Resolved]:
        """Pipelines that were resolved, by what the request says of them; it grows and is emptied when full."""
        return {}


def load_defaults(config: Config | Defaults | str | Path | None, registry: Registry) -> Defaults:
    """Make the defaults of an engine from a config, a path to one, or nothing."""
    if isinstance(config, Defaults):
        return config
    if isinstance(config, Config):
        return Defaults(config, registry)
    if config is None:
        return Defaults(Config(), registry)
    return Defaults(read_config(config, registry), registry, source=str(config))


def resolve_request(defaults: Defaults, request: Request, layer: Layer | None = None) -> Resolved:
    """Say how `request` is decoded, or raise a `ConfigError` that lists all that is wrong with it.

    Requests with equal strategy, plugins and profile share one pipeline object, so this is cheap for thousands.

    Args:
        defaults: what the engine was loaded with.
        request: its fields that are None come from the layers below.
        layer: stands between the defaults and the request (the keywords of transformers' `generate`).
    """
    key = repr((request.strategy, request.plugins, request.replace_plugins, request.profile, layer))
    base = defaults._resolved.get(key)
    if base is None:
        between = [layer] if layer else []
        layers = [*defaults.layers(request.profile), *between, *_decoding(request, defaults.registry)]
        base = resolve(layers, defaults.registry)
        if len(defaults._resolved) >= _CACHED:
            defaults._resolved.clear()
        defaults._resolved[key] = base
    given = _scalars(request)
    if not given:
        return base
    try:
        settings = validate(Variation, given, defaults.registry)
    except ConfigError as error:
        raise ConfigError([replace(p, field=p.field.removeprefix("limits.")) for p in error.problems]) from error
    merged = overlay(base.merged, Layer("request", settings))
    _check(merged)
    return Resolved(merged, base.pipeline)


def resolve(layers: Sequence[Layer], registry: Registry) -> Resolved:
    """Merge `layers`, lowest first, and build their pipeline, or raise a `ConfigError` with all that is wrong."""
    merged = merge(layers)
    if merged.settings.strategy is None:
        raise ConfigError([Problem("strategy", "; ".join(["name one", *merged.notes]))])
    try:
        pipeline = build_pipeline(merged.settings.strategy, merged.plugins, registry)
    except ConfigError as error:
        raise ConfigError([_with_source(problem, merged.provenance) for problem in error.problems]) from error
    _check(merged)
    return Resolved(merged, pipeline)


def check_config(config: Config, registry: Registry) -> list[Problem]:
    """List all that is wrong with a valid config's pipelines: its own and those of its profiles."""
    defaults = Defaults(config, registry)
    problems: list[Problem] = []
    for name in (None, *config.profiles):
        try:
            resolve(defaults.layers(name), registry)
        except ConfigError as error:
            known = {problem.field for problem in problems}
            prefix = "" if name is None else f"profiles.{name}."
            problems += [replace(p, field=prefix + p.field) for p in error.problems if p.field not in known]
    return problems


def describe(pipeline: Pipeline, parameters: Mapping[str, BaseModel] | None = None) -> dict[str, Any]:
    """Write a pipeline as the config that makes it, every parameter named.

    Args:
        pipeline: what to describe.
        parameters: a request's own, where they may differ from the group's; None: the pipeline's.
    """
    own = parameters or pipeline.parameters
    specs = [PluginSpec(p.name, own[p.name].model_dump(mode="json")) for p in pipeline.plugins]
    *plugins, strategy = [format_spec(spec) for spec in specs]
    return {"strategy": strategy, "plugins": plugins}


def _decoding(request: Request, registry: Registry) -> Iterator[Layer]:
    data: dict[str, Any] = {}
    if request.strategy is not None:
        data["strategy"] = request.strategy
    if request.plugins is not None:
        data["plugins!" if request.replace_plugins else "plugins"] = request.plugins
    if data:
        yield Layer("request", validate(Variation, data, registry))


def _scalars(request: Request) -> dict[str, Any]:
    limits = {name: given for name in LimitSettings.model_fields if (given := getattr(request, name, None)) is not None}
    given = {name: value for name in ("n", "logprobs", "raw", "chat") if (value := getattr(request, name)) is not None}
    return {**given, "limits": limits} if limits else given


def _check(merged: Merged) -> None:
    limits = merged.settings.limits
    for shortest, longest in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        low, high = getattr(limits, shortest), getattr(limits, longest)
        if low is not None and high is not None and low > high:
            problem = Problem(f"limits.{shortest}", f"at most {longest} ({high}), not {low}")
            raise ConfigError([_with_source(problem, merged.provenance)])


def _with_source(problem: Problem, provenance: Mapping[str, str]) -> Problem:
    field = problem.field
    while field and field not in provenance:
        field = field.rpartition(".")[0]
    return replace(problem, message=f"{problem.message} (from {provenance[field]})") if field else problem
