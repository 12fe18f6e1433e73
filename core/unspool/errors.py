"""Every mistake that a user, a plugin or a model can make, as a named error.

A message names the field, the value and what is allowed. `assert` elsewhere guards our own invariants only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UnspoolError(Exception):
    """The base of all errors that Unspool raises on purpose."""


class InputError(UnspoolError):
    """A request that cannot be served as it is: a bad field of a request, an argument, a line of a file.

    Args:
        field: the name of the field that is wrong, as the user wrote it.
        value: what it holds (shortened in the message).
        allowed: what would be right, as a phrase.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        shown = repr(value)
        super().__init__(f"{field} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {allowed}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.field, self.value, self.allowed)


class AdmissionError(InputError):
    """A request that can never fit: longer than the model's window, or larger than the pool of cache slots."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config: where, and what is allowed there."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ConfigError(UnspoolError):
    """A config that cannot be used, with *all* that is wrong with it in `problems`."""

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        self.problems, self.source = tuple(problems), source
        lines = [str(problem) for problem in self.problems]
        head = f"{source}: " if source else ""
        super().__init__(head + (lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems, self.source)


class PluginError(UnspoolError):
    """A plugin that raised, returned nonsense or spoilt a row. It fails its own requests alone."""

    def __init__(self, plugin: str, hook: str, reason: str) -> None:
        self.plugin, self.hook, self.reason = plugin, hook, reason
        super().__init__(f"plugin {plugin!r} failed in {hook}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.plugin, self.hook, self.reason)


class ConstraintError(PluginError):
    """A strategy chose a token that a plugin's path state calls impossible."""


class DeadEnd(UnspoolError):
    """Every continuation is forbidden (a row of all -inf) and no hypothesis is left to return.

    Args:
        path: the new token ids of the path that could not go on.
    """

    def __init__(self, path: Sequence[int]) -> None:
        self.path = tuple(path)
        super().__init__(f"every next token is forbidden after the new tokens {list(self.path)}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path,)


class ModelError(UnspoolError):
    """A model that cannot be loaded or cannot be run this way, with the reason."""


class Busy(UnspoolError):
    """The engine's waiting room is full: nothing was queued, and the same request may be tried later."""


class Closed(UnspoolError):
    """The engine was closed while the request was waiting or running."""


class OutputError(UnspoolError):
    """Results could not be written (a full disk, a broken pipe). Complete lines stay valid."""
