"""How users write a plugin: `top_p`, `top_p:0.9`, `top_p:p=0.9`, `{top_p: 0.9}`, `{top_p: {p: 0.9}}`, `{top_p: off}`.

All forms become a `PluginSpec`, a name with named parameters, or `Off`, which takes away what a lower layer named.
Whether the parameters are right is not decided here: a layer may give some of them and leave the others to the next.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from unspool.errors import ConfigError, Problem
from unspool.pipeline import PluginSpec
from unspool.plugin import Parameters
from unspool.registry import Registry

_NAMED = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)
_CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Off:
    """The wish that a plugin of a lower layer be left out: `top_k: off`."""

    name: str


def parse_spec(value: object, registry: Registry) -> PluginSpec | Off:
    """Read one plugin in any form that users may write, or raise a `ConfigError` whose field is empty."""
    if isinstance(value, PluginSpec):
        return value
    if isinstance(value, str):
        return _parse_string(value, registry)
    if not isinstance(value, Mapping):
        raise _error(f"a plugin is a name or {{name: parameters}}, not {value!r}")
    if len(value) != 1:
        raise _error(f"one name is wanted, not {len(value)} ({', '.join(map(str, value)) or 'none'})")
    [(name, given)] = value.items()
    if not isinstance(name, str):
        raise _error(f"a plugin's name is a string, not {name!r}")
    return _with_value(name, given, registry)


def format_spec(spec: PluginSpec | Off) -> str | dict[str, Any]:
    """Write a plugin the way a config file has it."""
    if isinstance(spec, Off):
        return {spec.name: False}
    return {spec.name: dict(spec.params)} if spec.params else spec.name


def nearest(name: object, allowed: Iterable[str]) -> str:
    """Say which allowed name was probably meant, as the beginning of a sentence, or nothing."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def _parse_string(text: str, registry: Registry) -> PluginSpec | Off:
    name, colon, body = text.partition(":")
    name = name.strip()
    if not colon:
        return _with_value(name, None, registry)
    parts = _split(body)
    named = [_NAMED.fullmatch(part) for part in parts]
    if not any(named):
        return _with_value(name, _scalar(body), registry, written=text)
    if not all(named):
        raise _error(f"{text!r}: write name:value or name:key=value,key=value")
    pairs = [(match[1], _scalar(match[2])) for match in named if match]
    if len({key for key, _ in pairs}) < len(pairs):
        raise _error(f"{text!r}: a parameter stands twice")
    registry.find(name)
    return PluginSpec(name, dict(pairs))


def _with_value(name: str, given: object, registry: Registry, written: str = "") -> PluginSpec | Off:
    params = _params(name, registry)
    main = params.main_field() if issubclass(params, Parameters) else None
    annotation = params.model_fields[main].annotation if main else None
    if given is False and not _accepts(annotation, bool):
        return Off(name)
    if given is None:
        return PluginSpec(name)
    if isinstance(given, Mapping) and not written:
        # A main parameter that is itself a mapping may be written bare: `logit_bias: {262: -5.0}`.
        bare = main is not None and _accepts(annotation, dict) and not set(given) & set(params.model_fields)
        if not bare:
            if bad := [key for key in given if not isinstance(key, str)]:
                raise _error(f"{name}: a parameter's name is a string, not {bad[0]!r}")
            return PluginSpec(name, dict(given))
    if main is None:
        fields = ", ".join(params.model_fields) or "it has none"
        raise _error(f"{name} takes no bare value such as {given!r}: name the parameter ({fields})")
    return PluginSpec(name, {main: given})


def _params(name: str, registry: Registry) -> Any:
    return registry.find(name, "").plugin.Params


def _accepts(annotation: Any, kind: type) -> bool:
    """Tell whether a field's type is `kind`, a generic of it, or a union with either."""
    origin = typing.get_origin(annotation)
    if isinstance(origin or annotation, type):
        found = origin or annotation
        return issubclass(found, kind) or (kind is dict and issubclass(found, Mapping))
    return any(_accepts(part, kind) for part in typing.get_args(annotation))


def _split(body: str) -> list[str]:
    """Split at commas that stand outside brackets and quotes."""
    parts, open_brackets, quote, start = [], [], "", 0
    for i, char in enumerate(body):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == "," and not open_brackets:
            parts.append(body[start:i])
            start = i + 1
    return [*parts, body[start:]]


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _error(f"cannot read the value {text!r}: {getattr(error, 'problem', None) or error}") from error


def _error(message: str) -> ConfigError:
    return ConfigError([Problem("", message)])
