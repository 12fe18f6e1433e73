"""The plugins that a case may name: those that are installed, the kit's own, and what a caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from unspool.errors import ConfigError, Problem
from unspool.pipeline import Pipeline, build_plugin
from unspool.plugin import Plugin
from unspool.registry import Registry
from unspool.spec import Off, parse_spec
from unspool_testing import drafters, hosts
from unspool_testing.claims import claim
from unspool_testing.host_claims import HOST_CLAIMS

KIT: Mapping[str, type[Plugin]] = {
    "kit_greedy": hosts.Likeliest,
    "kit_sample": hosts.Drawn,
    "kit_search": hosts.NarrowSearch,
    "kit_holds": hosts.LookAheadChoice,
    "kit_forks": hosts.Forks,
    "kit_particles": hosts.Particles,
    "kit_bias": hosts.Bias,
    "kit_tired": hosts.Tired,
    "kit_grammar": hosts.NoDoubles,
    "kit_guidance": hosts.Guidance,
    "kit_fails": hosts.Fails,
    "kit_chains": drafters.GuessChains,
    "kit_trees": drafters.GuessTrees,
    "kit_recall": drafters.Recall,
    "kit_draft_model": drafters.DraftModel,
}
"""The kit's own plugins. Cases name them; configs of users cannot."""

CLAIMS = "unspool.claims"
"""The group of entry points that name what plugins claim: see `claims.py`."""

Spec = str | dict[str, Any]
"""A plugin as a config has it: `greedy`, `{top_k: 3}`, `{beam: {width: 4}}`."""


@dataclass(frozen=True, eq=False)
class Known:
    """What names in a case stand for.

    Args:
        registry: classes by name.
        instances: plugin objects by name, used as they are.
        claims: what plugins claim, by name (see `claims.py`).
    """

    registry: Registry
    instances: Mapping[str, Plugin] = field(default_factory=dict)
    claims: Mapping[str, type | EntryPoint] = field(default_factory=dict)

    @classmethod
    def installed(cls) -> Known:
        """Know what is installed, and the kit's own."""
        points = entry_points(group=CLAIMS)
        claims: dict[str, type | EntryPoint] = {**HOST_CLAIMS, **{point.name: point for point in points}}
        return cls(Registry.installed().with_plugins(dict(KIT)), {}, claims)

    def claim(self, name: str, method: str) -> Callable[..., Any] | None:
        """Give one thing that a plugin claims, or None.

        Raises:
            ConfigError: its claims cannot be imported, or have a method that no law knows.
        """
        claims = self.claims.get(name)
        if isinstance(claims, EntryPoint):
            try:
                claims = claims.load()
            except Exception as error:
                reason = f"cannot import them: {type(error).__name__}: {error}"
                raise ConfigError([Problem(f"claims of {name}", reason)]) from error
        return claim(claims, method)

    def of(self, name: str) -> type[Plugin]:
        """Give the class that a name stands for, or raise a `ConfigError`."""
        return type(self.instances[name]) if name in self.instances else self.registry.find(name, "").plugin

    def plugin(self, spec: Spec) -> Plugin:
        """Make the plugin that a spec names, or raise a `ConfigError`."""
        if isinstance(spec, str) and spec in self.instances:
            return self.instances[spec]
        parsed = parse_spec(spec, self.registry)
        if isinstance(parsed, Off):
            raise ConfigError([Problem("plugins", f"{parsed.name} is switched off: leave it out")])
        return build_plugin(parsed, self.registry)

    def pipeline(self, strategy: Spec, plugins: tuple[Spec, ...] = ()) -> Pipeline:
        """Make a pipeline, or raise a `ConfigError`."""
        return Pipeline(self.plugin(strategy), [self.plugin(spec) for spec in plugins])

    def names(self, hook: str) -> list[str]:
        """List the installed plugins that implement a hook, the kit's own left out, in alphabetical order."""
        return sorted(
            entry.name
            for entry in self.registry
            if entry.name not in KIT and entry.broken is None and hasattr(entry.plugin, hook)
        )
