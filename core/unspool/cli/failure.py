"""How a command fails: a few lines on stderr, and an exit code that says whose fault it was."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from unspool.errors import ConfigError, InputError, ModelError, OutputError, UnspoolError

REQUEST_FAILED, INPUT_WRONG, OUTPUT_FAILED = 1, 2, 3


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn errors into messages and exit codes; with `debug`, print the traceback as well."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except OutputError as error:
        _tell(error, debug)
        raise typer.Exit(OUTPUT_FAILED) from None
    except (ConfigError, InputError, ModelError) as error:
        _tell(error, debug)
        raise typer.Exit(INPUT_WRONG) from None
    except Exception as error:
        _tell(error, debug)
        raise typer.Exit(REQUEST_FAILED) from None


def _tell(error: Exception, debug: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    if debug:
        traceback.print_exception(error, file=sys.stderr)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    head = Text("error: ", style="bold red")
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        console.print(head + Text(f"{error.source or 'config'}: {len(error.problems)} problems"))
        for problem in error.problems:
            console.print(Text("  ") + Text(problem.field or "-", style="bold") + Text(f": {problem.message}"))
        return
    hint = "" if debug else " (--debug shows where)"
    expected = isinstance(error, UnspoolError)
    console.print(head + Text(str(error) if expected else f"{type(error).__name__}: {error}{hint}"))
