"""What every comparison says beside its figures: the versions that it ran with, on the screen and in a file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import unspool


def versions() -> dict[str, Any]:
    """Say what runs here."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unspool": unspool.__version__,
        "threads": torch.get_num_threads(),
    }


def write(path: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a table, with the versions, to a JSON file; None: nowhere."""
    if path is not None:
        figures = json.dumps({"versions": versions(), "rows": list(rows)}, indent=2)
        Path(path).write_text(figures + "\n", encoding="utf-8")
