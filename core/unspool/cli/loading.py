"""Loading the engine for a command, with a word on what takes so long where stderr is a terminal."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.status import Status

    from unspool.engine import Engine
    from unspool.resolved import Defaults


@contextmanager
def staying() -> Iterator[None]:
    """Look for no garbage in what is imported and loaded meanwhile, nor later: it stays. That takes half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load_engine(defaults: Defaults) -> Engine:
    """Load the model that `defaults` names, telling so where stderr is a terminal."""
    with staying():
        return _load(defaults)


def _load(defaults: Defaults) -> Engine:
    from rich.console import Console

    told = logging.getLogger("unspool.huggingface")
    with Console(stderr=True).status(f"loading {defaults.config.model.name}") as status:
        from transformers.utils import logging as transformers_logging

        from unspool.engine import Engine

        quiet: Any = transformers_logging  # its functions have no types
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        told.setLevel(logging.INFO)
        told.addHandler(shown := _Shown(status))
        try:
            return Engine.load(config=defaults, registry=defaults.registry)
        finally:
            told.removeHandler(shown)


class _Shown(logging.Handler):
    """Shows the last record as the status."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        """Show it."""
        self._status.update(record.getMessage())
