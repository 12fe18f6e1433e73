"""Which plugins are installed: entry points of the group `unspool`, loaded only when a config names them."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from unspool.errors import ConfigError, Problem
from unspool.plugin import CONTRACT, Plugin

GROUP = "unspool"


class BrokenPlugin(Exception):
    """A plugin that is installed and cannot be used. It hurts nothing else."""


@dataclass(frozen=True)
class Entry:
    """One registered plugin.

    Args:
        name: what configs call it.
        target: `module:Class`.
        distribution: the name of the distribution that brings it.
        version: that distribution's version.
    """

    name: str
    target: str
    distribution: str = ""
    version: str = ""

    @cached_property
    def plugin(self) -> type[Plugin]:
        """Import the class. Raise `BrokenPlugin` with the reason where that fails."""
        module, _, attribute = self.target.partition(":")
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise BrokenPlugin(f"cannot import {self.target}: {type(error).__name__}: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Plugin)):
            raise BrokenPlugin(f"{self.target} is not a subclass of unspool.Plugin")
        if loaded.contract != CONTRACT:
            raise BrokenPlugin(f"it was written for hook contract {loaded.contract}; this core speaks {CONTRACT}")
        return loaded

    @property
    def broken(self) -> str | None:
        """Say why it cannot be used, or None."""
        try:
            _ = self.plugin
        except BrokenPlugin as error:
            return str(error)
        return None

    @property
    def is_strategy(self) -> bool:
        """Tell whether it implements `select`."""
        return hasattr(self.plugin, "select")


class Registry:
    """The plugins that can be named, by name.

    Two distributions that register one name are both listed under it; naming it is an error until one goes.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[str, Entry] = {}
        self._doubled: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.name in self._entries and self._entries[entry.name].target != entry.target:
                self._doubled.setdefault(entry.name, [self._entries[entry.name]]).append(entry)
            self._entries[entry.name] = entry

    @classmethod
    def installed(cls) -> Registry:
        """Read the entry points of all installed distributions. Import none of them."""
        points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
        distributions = {id(point.dist): point.dist for point in points}  # each once: its name is read from a file
        owners = {of: (each.name, each.version) if each else ("", "") for of, each in distributions.items()}
        return cls(Entry(point.name, point.value, *owners[id(point.dist)]) for point in points)

    def with_plugins(self, plugins: dict[str, type[Plugin]]) -> Registry:
        """Give a registry that also knows these classes (for tests and for scripts that register nothing)."""
        added = []
        for name, plugin in plugins.items():
            entry = Entry(name, f"{plugin.__module__}:{plugin.__qualname__}", "(given)")
            entry.__dict__["plugin"] = plugin
            added.append(entry)
        return Registry([*(e for e in self if e.name not in plugins), *added])

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def find(self, name: str, field: str = "plugins") -> Entry:
        """Find a usable plugin by name, or raise a `ConfigError` that names the nearest ones."""
        if name in self._doubled:
            owners = " and ".join(sorted({e.distribution for e in self._doubled[name]}))
            raise ConfigError([Problem(field, f"{name!r} is registered by {owners}: uninstall one of them")])
        entry = self._entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            installed = ", ".join(sorted(self._entries))
            raise ConfigError([Problem(field, f"no plugin {name!r}: {hint}installed: {installed}")])
        if reason := entry.broken:
            raise ConfigError([Problem(field, f"plugin {name!r} is broken: {reason}")])
        return entry
