"""Loading the engine for a command, without the bars that transformers draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool.engine import Engine
    from unspool.resolved import Defaults


def load_engine(defaults: Defaults) -> Engine:
    """Load the model that `defaults` names, telling so where stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"loading {defaults.config.model.name}"):
        from transformers.utils import logging

        from unspool.engine import Engine

        quiet: Any = logging  # its functions have no types
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        return Engine.load(config=defaults, registry=defaults.registry)
