"""A pipeline: one strategy and an ordered list of plugins, checked against each other and ready to be called.

Requests whose pipelines have equal keys form a group and share every hook call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel, ValidationError

from unspool.errors import ConfigError, InputError, PluginError, Problem
from unspool.hooks import Hooks
from unspool.plugin import Companion, Plugin, per_request_fields
from unspool.registry import Registry

if TYPE_CHECKING:
    from unspool.request import PreparedRequest

HOOKS = ("pre_forward", "logits_transform", "select", "stop_check")


@dataclass(frozen=True)
class PluginSpec:
    """A plugin's name and its parameters as the user wrote them."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def _no_hooks(kind: type[object]) -> frozenset[str]:
    """List the attributes of a class of plugins that implement no hook."""
    look = pluggy.PluginManager("unspool").parse_hookimpl_opts
    return frozenset(name for name in dir(kind) if name in _COMMON or look(kind, name) is None)


_COMMON = frozenset(dir(Plugin))
"""What every plugin has."""


class _Manager(pluggy.PluginManager):
    """Calls hooks in the order of the config, constraints' transforms first (pluggy itself begins with the last)."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        super().__init__("unspool")
        self.add_hookspecs(Hooks)
        for plugin in reversed(plugins):
            self.register(plugin, plugin.name)
        self.check_pending()

    # pluggy asks about every attribute, and its answer takes long.

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        return super().parse_hookspec_opts(module_or_class, name) if name in HOOKS else None

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if name in _no_hooks(type(plugin)):  # type: ignore[arg-type]  # to mypy no class is hashable
            return None
        options = super().parse_hookimpl_opts(plugin, name)
        if options is not None and name == "logits_transform" and plugin.constraint:
            return {**options, "tryfirst": True}  # a copy: pluggy's own belongs to the function, and others inherit it
        return options


class Pipeline:
    """One strategy and its plugins.

    Args:
        strategy: the plugin that implements `select`.
        plugins: all others, in the config's order.

    Raises:
        ConfigError: two strategies, a misspelt hook, or a plugin that refuses this pipeline.
    """

    def __init__(self, strategy: Plugin, plugins: Sequence[Plugin] = ()) -> None:
        self.strategy = strategy
        self.plugins: tuple[Plugin, ...] = (*plugins, strategy)
        """All plugins in the order in which their hooks are called, the strategy last."""
        problems = [
            Problem("plugins", f"{p.name!r} is a strategy, and {strategy.name!r} is one already: a pipeline has one")
            for p in plugins
            if hasattr(p, "select")
        ]
        if not hasattr(strategy, "select"):
            problems.append(Problem("strategy", f"{strategy.name!r} is no strategy: it does not implement select"))
        names = [p.name for p in self.plugins]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [Problem("plugins", f"{name!r} stands twice") for name in twice]
        if problems:
            raise ConfigError(problems)
        try:
            manager = _Manager(self.plugins)
        except pluggy.PluginValidationError as error:
            raise ConfigError([Problem("plugins", str(error))]) from error
        self.hook = manager.hook
        for plugin in self.plugins:
            if reason := plugin.refuse(self):
                problems.append(Problem(f"plugins.{plugin.name}", reason))
        if problems:
            raise ConfigError(problems)
        self.row_local = all(p.row_local for p in self.plugins)
        self.looks_ahead = (
            self.row_local and not strategy.holds and not any(p.reads_logprob or p.reads_score for p in self.plugins)
        )
        ranks = type(strategy).rank is not Plugin.rank
        self.independent = self.row_local and not ranks
        """Branches cannot affect each other: streams are returned, and streamed, one by one."""
        self.scores = not self.independent or any(p.reads_score for p in self.plugins)
        """Somebody may read a score, so the core sums log-probabilities where the strategy gives none."""
        self.stateful = tuple(p for p in self.plugins if type(p).initial is not Plugin.initial)
        self.reporters = tuple(p for p in self.plugins if type(p).report is not Plugin.report)
        self.reads_texts = ranks or bool(self.reporters)
        """Somebody looks at hypotheses before they are returned."""
        self.sharers = tuple(p for p in self.plugins if type(p).share is not Plugin.share)
        self.owners = tuple(p for p in self.plugins if type(p).open is not Plugin.open)
        self.hidden = tuple(sorted({layer for p in self.plugins for layer in p.hidden}))
        self.path_hidden = tuple(sorted({layer for p in self.plugins for layer in p.path_hidden}))
        self.reads_logprob = any(p.reads_logprob for p in self.plugins)
        self.transforms = self.has("logits_transform")
        self.drafts = self.has("pre_forward")

    def has(self, hook: str) -> bool:
        """Tell whether any plugin implements `hook`."""
        return bool(getattr(self.hook, hook).get_hookimpls())

    def implementations(self, hook: str) -> list[tuple[Plugin, Callable[..., Any]]]:
        """List the plugins that implement `hook`, each with a call that takes all of the hook's arguments, in order."""
        return [(impl.plugin, _call(impl)) for impl in reversed(getattr(self.hook, hook).get_hookimpls())]

    @cached_property
    def companions(self) -> Mapping[str, Companion]:
        """Name the companions of all plugins. Two plugins that share a name share the companion."""
        found: dict[str, Companion] = {}
        for plugin in self.plugins:
            for name, companion in plugin.companions().items():
                if found.setdefault(name, companion) != companion:
                    reason = f"companion {name!r} is declared differently"
                    raise ConfigError([Problem(f"plugins.{plugin.name}", reason)])
        return found

    def companion_prompt(self, name: str, request: PreparedRequest) -> Sequence[int] | None:
        """Give the prompt that a companion reads in a request; None: the request's own.

        Raises:
            PluginError: the function that the companion gave for it raised, or gives no token.
        """
        prompt = self.companions[name].prompt
        if not callable(prompt):
            return prompt
        try:
            ids = prompt(request)
        except InputError:
            raise
        except Exception as error:
            reason = f"the prompt of companion {name!r}: {type(error).__name__}: {error}"
            raise PluginError(self._owner_of(name), "companions", reason) from error
        if not ids:
            raise PluginError(self._owner_of(name), "companions", f"the prompt of companion {name!r} has no token")
        return ids

    def _owner_of(self, companion: str) -> str:
        return next(plugin.name for plugin in self.plugins if companion in plugin.companions())

    @cached_property
    def key(self) -> str:
        """Name the group: everything but the fields that may differ between the requests of a group."""
        return json.dumps(
            [(p.name, f"{type(p).__module__}:{type(p).__qualname__}", group_params(p.params)) for p in self.plugins],
            sort_keys=True,
            default=str,
        )

    @cached_property
    def parameters(self) -> Mapping[str, BaseModel]:
        """Map each plugin's name to its parameters."""
        return {p.name: p.params for p in self.plugins}

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(p.name for p in self.plugins)})"


def _call(impl: Any) -> Callable[..., Any]:
    return lambda **available: impl.function(**{name: available[name] for name in impl.argnames})


def group_params(params: BaseModel) -> dict[str, Any]:
    """Give the parameters that all requests of a group have in common."""
    return params.model_dump(mode="json", exclude=set(per_request_fields(type(params))))


def build_plugin(spec: PluginSpec, registry: Registry, field: str = "plugins") -> Plugin:
    """Make a plugin from its name and parameters, or raise a `ConfigError` with all that is wrong."""
    entry = registry.find(spec.name, field)
    try:
        params = entry.plugin.Params.model_validate(dict(spec.params))
    except ValidationError as error:
        raise ConfigError([_problem(e, f"{field}.{spec.name}", entry.plugin.Params) for e in error.errors()]) from error
    plugin = entry.plugin(params)
    plugin.name = spec.name
    return plugin


def build_pipeline(strategy: PluginSpec, plugins: Iterable[PluginSpec], registry: Registry) -> Pipeline:
    """Make a pipeline, or raise one `ConfigError` with all that is wrong with all of it."""
    problems: list[Problem] = []
    built: list[Plugin] = []
    for field_name, spec in [("strategy", strategy), *(("plugins", p) for p in plugins)]:
        try:
            built.append(build_plugin(spec, registry, field_name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Pipeline(built[0], built[1:])


def _problem(error: Any, prefix: str, params: type[BaseModel]) -> Problem:
    where = ".".join([prefix, *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(params.model_fields) or "none"
        return Problem(where, f"no such parameter: allowed: {allowed}")
    given = "" if error["type"] == "missing" else f", not {error['input']!r}"
    return Problem(where, f"{error['msg']}{given}")
