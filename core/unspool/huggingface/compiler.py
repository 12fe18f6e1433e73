"""Compiling beside the work: in a process of its own, at the lowest priority, never in the way of an answer."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)
PAYS_AFTER_S = 600.0
"""Seconds that a model has computed in this process before it is compiled unasked: shorter runs would only wait."""


class Compiler:
    """Has a model compiled once it has computed for long enough, and says so when it is done.

    Args:
        command: what to run.
        after_s: how many seconds of passes to wait for.
        done: called when the command has succeeded, on a thread of this class.
    """

    def __init__(self, command: Sequence[str], after_s: float, done: Callable[[], object]) -> None:
        self._command, self._left, self._done = command, after_s, done
        self._thread: threading.Thread | None = None

    def note(self, seconds: float) -> None:
        """Count what a pass took."""
        self._left -= seconds
        if self._left <= 0 and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="unspool-compile", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait for the end of what was begun."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        words = [*(("nice", "-n", "19") if os.name == "posix" else ()), *self._command]
        _log.info("compiling the model beside the work")
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            _log.warning("the model could not be compiled: %s", error)
            return
        atexit.register(process.kill)
        _, said = process.communicate()
        atexit.unregister(process.kill)
        if process.returncode:
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            _log.warning("the model could not be compiled: %s", last or f"exit {process.returncode}")
        else:
            self._done()


def command(model: str, **options: object) -> list[str]:
    """Give the command that compiles a model as it is loaded here."""
    words = [sys.executable, "-m", "unspool", "compile", model]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
