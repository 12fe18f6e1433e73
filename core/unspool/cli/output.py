"""Writing to stdout: text as it comes, and a reader that went away or a disk that is full is no traceback."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from unspool.errors import OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 200
"""Columns where nobody looks: a line stays a line for whoever searches it."""


def write(text: str) -> None:
    """Write `text` to stdout at once.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        _forget_stdout()
        raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error


def rendered(*parts: RenderableType) -> str:
    """Lay `parts` out for stdout: in colour and to its width where it is a terminal."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), highlight=False, force_terminal=terminal, width=None if terminal else _WIDE)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().split("\n"))


def _forget_stdout() -> None:
    """Send what is still buffered nowhere, or Python would complain about it once more at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
