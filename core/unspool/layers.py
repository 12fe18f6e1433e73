"""Layers of a config, laid over each other: the model's own defaults < file < profile < command line < request.

    a scalar        the upper layer's value holds
    the strategy    the same name again overrides parameters in place; another name takes its place
    plugins         a name again overrides parameters in place, a new one is appended, `name: off` takes one away
    plugins!        the whole list, instead of what the lower layers say

Every value remembers its source. Layers go in validated; whether the whole makes a pipeline is asked in `resolved.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from unspool.config import LimitSettings, Variation
from unspool.pipeline import PluginSpec
from unspool.spec import Off


@dataclass(frozen=True)
class Layer:
    """What one source says.

    Args:
        source: who says it, as a phrase.
        settings: what is said; fields that are None are not.
        sampling: plugins that only shape what is drawn.
        unless: strategies under which `sampling` is dropped.
        ranks: where a new plugin goes: before the first one of a higher rank. Without a rank: to the end.
        notes: what the user should know of how this layer came about.
    """

    source: str
    settings: Variation
    sampling: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merged:
    """Layers laid over each other.

    Args:
        settings: the effective values, defaults not filled in; no plugin of it is off.
        provenance: dotted field -> source, `plugins.top_p.p` for a parameter.
        notes: what was dropped, and why.
    """

    settings: Variation = field(default_factory=Variation)
    provenance: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def plugins(self) -> tuple[PluginSpec, ...]:
        """Give the effective plugins in order."""
        return tuple(spec for spec in self.settings.plugins or () if isinstance(spec, PluginSpec))


def merge(layers: Sequence[Layer]) -> Merged:
    """Lay `layers` over each other, lowest first. Pure."""
    merged = reduce(overlay, layers, Merged())
    for layer in layers:
        merged = _without_idle_samplers(merged, layer)
    return merged


def overlay(below: Merged, layer: Layer) -> Merged:
    """Lay one layer over what is merged already. Pure."""
    provenance, upper, lower = dict(below.provenance), layer.settings, below.settings
    plugins = _overlay_plugins(below, layer, provenance)
    changes: dict[str, Any] = {
        "strategy": _overlay_strategy(lower.strategy, upper.strategy, layer.source, provenance),
        "plugins": plugins,
        "limits": _overlay_limits(lower.limits, upper.limits, layer.source, provenance),
    }
    for name in ("seed", "n", "logprobs", "raw"):
        if (value := getattr(upper, name)) is not None:
            changes[name], provenance[name] = value, layer.source
    if upper.chat is not None:
        changes["chat"] = {**(lower.chat or {}), **upper.chat}
        provenance |= {f"chat.{name}": layer.source for name in upper.chat}
    return Merged(lower.model_copy(update=changes), provenance, (*below.notes, *layer.notes))


def _overlay_strategy(
    lower: PluginSpec | None, upper: PluginSpec | None, source: str, provenance: dict[str, str]
) -> PluginSpec | None:
    if upper is None:
        return lower
    if lower is None or lower.name != upper.name:
        _forget(provenance, "strategy")
        lower = PluginSpec(upper.name)
    provenance["strategy"] = source
    provenance |= {f"strategy.{name}": source for name in upper.params}
    return PluginSpec(upper.name, {**lower.params, **upper.params})


def _overlay_plugins(below: Merged, layer: Layer, provenance: dict[str, str]) -> tuple[PluginSpec, ...]:
    plugins, given = list(below.plugins), layer.settings.plugins
    if layer.settings.replace_plugins is not None:
        _forget(provenance, "plugins")
        plugins, given = [], layer.settings.replace_plugins
    for spec in given or ():
        at = next((i for i, plugin in enumerate(plugins) if plugin.name == spec.name), None)
        if isinstance(spec, Off):
            if at is not None:
                del plugins[at]
                _forget(provenance, f"plugins.{spec.name}")
            continue
        if at is None:
            plugins.insert(_place(spec.name, plugins, layer.ranks), spec)
            provenance[f"plugins.{spec.name}"] = layer.source
        else:
            plugins[at] = PluginSpec(spec.name, {**plugins[at].params, **spec.params})
        provenance |= {f"plugins.{spec.name}.{name}": layer.source for name in spec.params}
    return tuple(plugins)


def _place(name: str, plugins: Sequence[PluginSpec], ranks: Mapping[str, int]) -> int:
    if name in ranks:
        for i, plugin in enumerate(plugins):
            if ranks.get(plugin.name, -1) > ranks[name]:
                return i
    return len(plugins)


def _overlay_limits(
    lower: LimitSettings, upper: LimitSettings, source: str, provenance: dict[str, str]
) -> LimitSettings:
    given = {name: value for name in LimitSettings.model_fields if (value := getattr(upper, name)) is not None}
    if not given:
        return lower
    # Two names for one limit: whoever speaks last is meant, whichever name is used.
    for one, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        for name, twin in ((one, other), (other, one)):
            if name in given and twin not in given:
                given[twin] = None
    for name, value in given.items():
        if value is None:
            provenance.pop(f"limits.{name}", None)
        else:
            provenance[f"limits.{name}"] = source
    return lower.model_copy(update=given)


def _without_idle_samplers(merged: Merged, layer: Layer) -> Merged:
    """Drop the samplers that `layer` alone names where the final strategy draws nothing."""
    strategy, source = merged.settings.strategy, merged.provenance.get("strategy")
    if not layer.sampling or strategy is None or strategy.name not in layer.unless:
        return merged
    idle = {name for name in layer.sampling if _sources(merged.provenance, f"plugins.{name}") == {layer.source}}
    if not idle:
        return merged
    provenance = dict(merged.provenance)
    for name in idle:
        _forget(provenance, f"plugins.{name}")
    kept = tuple(spec for spec in merged.plugins if spec.name not in idle)
    dropped = ", ".join(spec.name for spec in merged.plugins if spec.name in idle)
    note = f"{dropped} of {layer.source} left out: {strategy.name} ({source}) does not sample"
    return Merged(merged.settings.model_copy(update={"plugins": kept}), provenance, (*merged.notes, note))


def _sources(provenance: Mapping[str, str], prefix: str) -> set[str]:
    return {source for name, source in provenance.items() if name == prefix or name.startswith(f"{prefix}.")}


def _forget(provenance: dict[str, str], prefix: str) -> None:
    for name in [name for name in provenance if name == prefix or name.startswith(f"{prefix}.")]:
        del provenance[name]
