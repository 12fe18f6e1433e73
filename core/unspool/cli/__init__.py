"""The command line: `unspool generate`, `run`, `compile`, `plugins` and `config`, and what other distributions add.

Exit codes: 0 done, 1 some request failed, 2 the input is wrong, 3 the output could not be written. Nothing here imports
torch or a model before a command needs it, so help and completion are quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from unspool.cli import compile as compiling
from unspool.cli import config, generate, plugins, run
from unspool.cli.commands import Commands

app = typer.Typer(
    name="unspool",
    cls=Commands,
    help="Decode language models with strategies that are plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("run")(run.run)
app.command("compile")(compiling.compile_model)
app.command("plugins")(plugins.plugins)
app.add_typer(config.app, name="config")


def _version(asked: bool) -> None:
    if asked:
        from unspool import __version__

        typer.echo(f"unspool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before every command."""


def main() -> None:
    """Run the command line."""
    app()
