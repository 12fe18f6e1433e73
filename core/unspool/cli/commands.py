"""Commands that other distributions bring: entry points of the group `unspool.commands`.

A target is a typer function or a `typer.Typer`. Only a command that is called, or that help must describe, is imported.
One that cannot be imported is listed as broken with its reason, and hurts nothing else. A name of the core's own stays
the core's.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import Any

import typer
from typer.core import TyperGroup

from unspool.cli import options
from unspool.cli.failure import reported
from unspool.errors import ConfigError, Problem

GROUP = "unspool.commands"
COMES_WITH = {"check": "unspool-testing", "new": "unspool-testing"}
"""Where a command that the documentation speaks of is found, for whoever has not installed it."""


class Commands(TyperGroup):
    """The commands of the core, then those of other distributions, each imported when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name all commands. Import none."""
        return list(dict.fromkeys([*super().list_commands(ctx), *sorted(_points())]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Give a command, or None."""
        if cmd_name not in self.commands and (found := _points().get(cmd_name)):
            self.commands[cmd_name] = _command(cmd_name, found)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is called, or fail with where it can be had or what was meant."""
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            if owner := COMES_WITH.get(args[0]):
                ctx.fail(f"No such command {args[0]!r} here: it comes with {owner} (pip install {owner}).")
            for name in self.list_commands(ctx):  # what was meant may be any of them
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _points() -> dict[str, list[EntryPoint]]:
    """Read the entry points by name. Equal ones are one: a path may list a distribution twice."""
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        named = found.setdefault(point.name, [])
        if point.value not in [other.value for other in named]:
            named.append(point)
    return found


def _command(name: str, points: Iterable[EntryPoint]) -> Any:
    """Import a command, or make one that says why it cannot be used."""
    outer = typer.Typer()
    try:
        [point, *others] = points
        if others:
            owners = sorted(other.dist.name if other.dist else other.value for other in (point, *others))
            raise ValueError(f"{' and '.join(owners)} register it: uninstall one of them")
        target = point.load()
        if isinstance(target, typer.Typer):
            outer.add_typer(target, name=name)
        elif callable(target):
            outer.command(name)(target)
        else:
            raise TypeError(f"{point.value} is neither a function nor a typer.Typer")
        return typer.main.get_group(outer).commands[name]
    except Exception as error:
        return _broken(name, error)


def _broken(name: str, error: Exception) -> Any:
    from rich.markup import escape

    reason = f"{type(error).__name__}: {error}"
    outer = typer.Typer()

    # Whatever it was called with, the reason is what there is to say.
    @outer.command(
        name,
        help=f"Broken: {escape(reason)}",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def tell(debug: options.Debug = False) -> None:
        with reported(debug):
            raise ConfigError([Problem("", f"command {name!r} is broken: {reason}")]) from error

    return typer.main.get_group(outer).commands[name]
