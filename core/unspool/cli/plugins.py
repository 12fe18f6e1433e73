"""`unspool plugins`: what is installed, from where, and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported

if TYPE_CHECKING:
    from rich.table import Table

    from unspool.registry import Entry, Registry


def plugins(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this plugin's parameters.", autocompletion=options.plugin_names, show_default=False),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """List the installed plugins, or show one of them."""
    with reported(debug):
        from unspool.cli.output import rendered, write
        from unspool.registry import Registry

        registry = Registry.installed()
        if name is None:
            write(rendered(_listing(registry)))
        else:
            entry = registry.find(name, "name")
            write(f"{_heading(entry)}\n\n{_documentation(entry)}\n\n{rendered(_parameters(entry))}")


def _listing(registry: Registry) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "distribution", "what it does"):
        table.add_column(column, no_wrap=column == "name")
    ordered = sorted(registry, key=lambda entry: (entry.broken is not None or not entry.is_strategy, entry.name))
    for entry in ordered:
        if reason := entry.broken:
            table.add_row(entry.name, Text("broken", style="bold red"), _origin(entry), Text(reason))
        else:
            table.add_row(entry.name, _kind(entry), _origin(entry), Text(_summary(entry)))
    return table


def _kind(entry: Entry) -> str:
    if entry.is_strategy:
        return "strategy"
    return "constraint" if entry.plugin.constraint else "plugin"


def _origin(entry: Entry) -> str:
    return f"{entry.distribution} {entry.version}".strip()


def _summary(entry: Entry) -> str:
    return (entry.plugin.__doc__ or "").strip().partition("\n")[0]


def _heading(entry: Entry) -> str:
    return f"{entry.name}: a {_kind(entry)} from {_origin(entry)} ({entry.target})"


def _documentation(entry: Entry) -> str:
    import inspect
    import sys

    module = sys.modules[entry.plugin.__module__]
    return inspect.cleandoc(module.__doc__ or entry.plugin.__doc__ or "")


def _parameters(entry: Entry) -> Table:
    from rich.table import Table
    from rich.text import Text

    params = entry.plugin.Params
    if not params.model_fields:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("It has no parameters.")
        return table
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "type", "default", "what it means"):
        table.add_column(column)
    properties = params.model_json_schema().get("properties", {})
    for field, info in params.model_fields.items():
        main = " (main)" if field == params.main_field() else ""
        default = "required" if info.is_required() else str(info.get_default(call_default_factory=True))
        about = info.description or ""
        table.add_row(f"{field}{main}", Text(_type(properties.get(field, {}))), Text(default), Text(about))
    return table


def _type(schema: dict[str, Any]) -> str:
    """Write a parameter's type with its bounds, as its JSON Schema has them."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"])
    kind = str(schema.get("type", "any"))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()
