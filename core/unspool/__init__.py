"""Unspool: a plugin-based decoding-strategy framework for language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool.engine import Engine as Engine
    from unspool.errors import UnspoolError as UnspoolError
    from unspool.hooks import Growth as Growth
    from unspool.plugin import Companion as Companion
    from unspool.plugin import Parameters as Parameters
    from unspool.plugin import Plugin as Plugin
    from unspool.plugin import TokenId as TokenId
    from unspool.plugin import TokenIds as TokenIds
    from unspool.plugin import hookimpl as hookimpl
    from unspool.plugin import per_request as per_request
    from unspool.request import Hypothesis as Hypothesis
    from unspool.request import Request as Request
    from unspool.request import Result as Result
    from unspool.step import Step as Step

_HOMES = {
    "Companion": "plugin",
    "Engine": "engine",
    "Growth": "hooks",
    "Hypothesis": "request",
    "Parameters": "plugin",
    "Plugin": "plugin",
    "Request": "request",
    "Result": "request",
    "Step": "step",
    "TokenId": "plugin",
    "TokenIds": "plugin",
    "UnspoolError": "errors",
    "hookimpl": "plugin",
    "per_request": "plugin",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"unspool.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unspool' has no attribute {name!r}")
