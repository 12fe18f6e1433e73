"""The plugin that is checked: what it is called, what it does, and what stands beside it."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unspool.errors import ConfigError, InputError, Problem
from unspool.plugin import Plugin
from unspool.registry import Registry
from unspool.wrapped import wrap_criteria, wrap_processor
from unspool_testing.known import KIT, Known, Spec


@dataclass(frozen=True, eq=False)
class Subject:
    """A plugin under check.

    Args:
        name: what cases call it.
        known: all plugins that cases may name, this one among them.
        params: parameters that are given; the others are drawn.
    """

    name: str
    known: Known
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, plugin: object, *, params: Mapping[str, Any] | None = None, claims: type | None = None) -> Subject:
        """Take a plugin in any form.

        Args:
            plugin: the name of an installed plugin, `module:Class`, a subclass of `Plugin` or an instance of one, or a
                logits processor or stopping criterion of transformers.
            params: parameters to keep; the others are drawn from their bounds.
            claims: what it claims, where no entry point says so (see `claims.py`).

        Raises:
            ConfigError: no such plugin, or it is broken, or it does not take these parameters.
            InputError: this is no plugin.
        """
        known = Known.installed()
        given = dict(params or {})
        if isinstance(plugin, str) and ":" in plugin:
            plugin = _imported(plugin)
        if isinstance(plugin, type) and not issubclass(plugin, Plugin):
            try:
                plugin, given = plugin(**given), {}  # a class of transformers
            except Exception as error:
                raise InputError("plugin", plugin, f"cannot make one: {type(error).__name__}: {error}") from error
        if isinstance(plugin, str):
            if plugin not in KIT:
                Registry.installed().find(plugin, "plugin")
            name = plugin
        elif isinstance(plugin, type):
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plugin.__name__).lower()
            known = dataclasses.replace(known, registry=known.registry.with_plugins({name: plugin}))
        else:
            made = plugin if isinstance(plugin, Plugin) else _wrapped(plugin)
            if given:
                raise InputError("params", given, "none: the object that was given has its own")
            name = made.name
            known = dataclasses.replace(
                known, registry=known.registry.with_plugins({name: type(made)}), instances={name: made}
            )
        if claims is not None:
            known = dataclasses.replace(known, claims={**known.claims, name: claims})
        subject = cls(name, known, given)
        for parameter in given:
            if parameter not in subject.kind.Params.model_fields:
                allowed = ", ".join(subject.kind.Params.model_fields) or "none"
                raise ConfigError([Problem(f"params.{parameter}", f"no such parameter: allowed: {allowed}")])
        return subject

    @property
    def kind(self) -> type[Plugin]:
        """Give its class."""
        return self.known.of(self.name)

    def has(self, hook: str) -> bool:
        """Tell whether it implements a hook."""
        return hasattr(self.kind, hook)

    @property
    def is_strategy(self) -> bool:
        """Tell whether it chooses."""
        return self.has("select")

    @property
    def drafts(self) -> bool:
        """Tell whether it is a drafter: it guesses, and neither chooses nor forbids."""
        return self.has("pre_forward") and not self.is_strategy and not self.kind.constraint

    @property
    def has_state(self) -> bool:
        """Tell whether it keeps state along the path."""
        return self.kind.initial is not Plugin.initial

    def claim(self, method: str) -> Any:
        """Give one thing that it claims, or None."""
        return self.known.claim(self.name, method)

    def spec(self, params: Mapping[str, Any]) -> Spec:
        """Write it as a config has it."""
        return {self.name: dict(params)} if params else self.name


def _imported(target: str) -> object:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise InputError("plugin", target, f"cannot import it: {type(error).__name__}: {error}") from error


def _wrapped(given: object) -> Plugin:
    """Make a plugin of an object of transformers. That it is pure is what the laws will check."""
    if not callable(given):
        raise InputError("plugin", given, "a plugin's name, module:Class, a plugin, or a logits processor")
    if any(base.__name__ == "StoppingCriteria" for base in type(given).__mro__):
        return wrap_criteria(given)
    return wrap_processor(given, pure=True)
