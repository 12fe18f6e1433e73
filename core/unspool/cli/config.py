"""`unspool config`: what holds and why, what may be written, and what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported

if TYPE_CHECKING:
    from unspool.resolved import Defaults, Resolved

app = typer.Typer(help="Show, check and describe configs.", no_args_is_help=True)


@app.command()
def show(
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    strategy: options.Strategy = None,
    plugins: options.Plugins = None,
    model: options.Model = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: Annotated[int | None, typer.Option(help="The seed of the run.", show_default=False)] = None,
    n: options.Number = None,
    logprobs: options.Logprobs = None,
    raw: options.Raw = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print values and sources as JSON.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show every effective value and where it comes from. No weight is loaded."""
    with reported(debug):
        from dataclasses import replace

        from unspool.cli.output import write
        from unspool.generation_config import read_generation_config
        from unspool.registry import Registry
        from unspool.request import Request
        from unspool.resolved import resolve_request

        defaults = options.command_line(
            Registry.installed(),
            config=config,
            profile=profile,
            model=model,
            strategy=strategy,
            plugins=plugins,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
            seed=seed,
            n=n,
            logprobs=logprobs,
            raw=raw,
        )
        settings = defaults.config.model
        defaults = replace(defaults, generation=read_generation_config(settings.name, settings.revision))
        resolved = resolve_request(defaults, Request(prompt=""))
        rows = [*_model_values(defaults, model), *_values(resolved)]
        if as_json:
            record = {"values": {f: {"value": v, "source": s} for f, v, s in rows}, "notes": list(resolved.notes)}
            write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
        else:
            write(_table(rows, resolved.notes))


@app.command()
def schema(debug: options.Debug = False) -> None:
    """Print the JSON Schema of config files, with every installed plugin in it."""
    with reported(debug):
        from unspool.cli.output import write
        from unspool.registry import Registry
        from unspool.schema import config_schema

        write(json.dumps(config_schema(Registry.installed()), indent=2, ensure_ascii=False) + "\n")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A config file, YAML or TOML.")], debug: options.Debug = False
) -> None:
    """Say everything that is wrong with a config file. No weight is loaded."""
    with reported(debug):
        from unspool.cli.output import write
        from unspool.config import read_config
        from unspool.errors import ConfigError
        from unspool.registry import Registry
        from unspool.resolved import check_config

        registry = Registry.installed()
        parsed = read_config(file, registry)
        if problems := check_config(parsed, registry):
            raise ConfigError(problems, str(file))
        write(f"{file}: ok\n")


def _model_values(defaults: Defaults, named: str | None) -> Iterator[tuple[str, Any, str]]:
    settings = defaults.config.model
    for name, value in settings.model_dump().items():
        if value is not None:
            source = defaults.source if name in settings.model_fields_set else "default"
            yield f"model.{name}", value, options.SOURCE if name == "name" and named is not None else source


def _values(resolved: Resolved) -> Iterator[tuple[str, Any, str]]:
    """List every effective value with its dotted field and its source."""
    from unspool.resolved import DEFAULT_MAX_NEW_TOKENS

    sources = resolved.provenance
    for plugin in (resolved.pipeline.strategy, *resolved.pipeline.plugins[:-1]):
        strategy = plugin is resolved.pipeline.strategy
        field = "strategy" if strategy else f"plugins.{plugin.name}"
        yield field, plugin.name, sources[field]
        for name, value in plugin.params.model_dump(mode="json").items():
            yield f"{field}.{name}", value, sources.get(f"{field}.{name}", f"default of {plugin.name}")
    limits = resolved.merged.settings.limits
    if limits.max_new_tokens is None and limits.max_length is None:
        yield "limits.max_new_tokens", DEFAULT_MAX_NEW_TOKENS, "default"
    for name, value in limits.model_dump(mode="json").items():
        if value is not None:
            yield f"limits.{name}", value, sources[f"limits.{name}"]
    yield "n", resolved.n, sources.get("n", "default")
    yield "raw", resolved.raw, sources.get("raw", "default")
    for name, value in (("seed", resolved.seed), ("logprobs", resolved.logprobs)):
        if value is not None:
            yield name, value, sources[name]
    for name, value in resolved.chat.items():
        yield f"chat.{name}", value, sources[f"chat.{name}"]


def _table(rows: list[tuple[str, Any, str]], notes: tuple[str, ...]) -> str:
    from rich.table import Table
    from rich.text import Text

    from unspool.cli.output import rendered

    table = Table(box=None, pad_edge=False)
    for column in ("field", "value", "source"):
        table.add_column(column, overflow="fold")
    for field, value, source in rows:
        table.add_row(Text(field), Text(json.dumps(value, ensure_ascii=False)), Text(source, style="dim"))
    return rendered(table, *(Text("note: ", style="bold yellow") + Text(note) for note in notes))
