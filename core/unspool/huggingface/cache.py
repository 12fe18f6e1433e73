"""Where in the user's cache what takes long to make is kept."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """Give our folder of a name in the user's cache. It may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "unspool" / name
