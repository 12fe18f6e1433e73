"""Planting: a function runs with one piece of its source replaced, and afterwards runs as it was.

Only its code is exchanged. So whoever holds the function (an importer, a pipeline, pydantic) gets the slip too, and
gets rid of it again.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import pytest


class Slip(Protocol):
    """One change to the project, for as long as a monkeypatch lasts."""

    @property
    def where(self) -> str:
        """Name what is changed."""

    @property
    def change(self) -> str:
        """Show the change, as a diff does."""

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it."""


@dataclass(frozen=True)
class Edit:
    """Pieces of a function's source, each of which stands there once, and what stands there instead."""

    function: FunctionType
    pieces: tuple[tuple[str, str], ...]

    @property
    def where(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def change(self) -> str:
        lines = [
            (mark, line) for old, new in self.pieces for mark, text in (("-", old), ("+", new)) for line in _lines(text)
        ]
        return "\n".join(f"{mark} {line}" for mark, line in lines)

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = inspect.getsource(self.function)
        for old, new in self.pieces:
            assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {self.where}, not once"
            source = source.replace(old, new)
        monkeypatch.setattr(self.function, "__code__", _compiled(self.function, source))


@dataclass(frozen=True)
class Declaration:
    """A member of a class, declared otherwise."""

    of: type
    member: str
    value: Any

    @property
    def where(self) -> str:
        return f"{self.of.__module__}.{self.of.__qualname__}"

    @property
    def change(self) -> str:
        return f"- {self.member} = {getattr(self.of, self.member)!r}\n+ {self.member} = {self.value!r}"

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.of, self.member, self.value)


def edit(function: Any, *pieces: tuple[str, str] | str) -> Edit:
    """Change a function, a method or a property: `edit(f, "old", "new")`, or pairs of both."""
    if isinstance(pieces[0], str):
        old, new = pieces
        pieces = ((str(old), str(new)),)
    return Edit(_function(function), tuple(pair for pair in pieces if not isinstance(pair, str)))


def _function(given: Any) -> FunctionType:
    for attribute in ("fget", "func", "__func__"):
        given = getattr(given, attribute, given)
    assert isinstance(given, FunctionType), f"{given!r} has no source of its own"
    return given


def _compiled(function: FunctionType, source: str) -> Any:
    """Compile a function anew, at the lines where it stands; give its code."""
    text = textwrap.dedent(source)
    first = function.__code__.co_firstlineno
    if "__class__" in function.__code__.co_freevars:  # it calls `super()`
        text = "def _within(__class__):\n" + textwrap.indent(text, "    ") + f"    return {function.__name__}\n"
        first -= 1
    flags = __future__.annotations.compiler_flag
    code = compile("\n" * (first - 1) + text, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    return _find(code, function.__name__)


def _find(code: Any, name: str) -> Any:
    """Find the code of a function in that of a module, or of the function around it."""
    for constant in code.co_consts:
        if inspect.iscode(constant):
            if constant.co_name == name:
                return constant
            if constant.co_name == "_within":
                return _find(constant, name)
    raise AssertionError(f"{name} was not compiled")


def _lines(text: str) -> list[str]:
    return textwrap.dedent(text).strip("\n").splitlines()
