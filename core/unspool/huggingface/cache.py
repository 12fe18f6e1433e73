"""Where in the user's cache what takes long to make is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DRAFT = "draft-"
_STALE_S = 24 * 3600
"""A draft that nobody has touched for so long was left by a process that was killed."""


def folder(name: str) -> Path:
    """Give our folder of a name in the user's cache. It may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "unspool" / name


@contextmanager
def draft(place: Path) -> Iterator[Path]:
    """Give a folder on the disk of `place` for what is being made, gone afterwards; move it to its place when whole.

    Args:
        place: the folder that what is made will be in. It is made if it is not there.
    """
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{_DRAFT}*"):
        with suppress(FileNotFoundError):  # whoever made it has just removed it
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=_DRAFT, ignore_cleanup_errors=True) as path:
        yield Path(path)


def kept(place: Path) -> list[Path]:
    """List what is in a folder of ours, files and folders, but for what is being made."""
    return sorted(path for path in place.glob("*") if not path.name.startswith(_DRAFT))


def size(path: Path) -> int:
    """Give the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
