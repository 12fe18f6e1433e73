"""Keys: what makes a watermark somebody's own.

A key is a whole number or a text, and a number is the same key as its digits. Whoever has it can find the watermark and
forge it. A result carries the config that made it, so a key that is written in a config stands in every result; a key
in a file does not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from unspool.errors import ConfigError, Problem


class KeyFile(BaseModel):
    """A key that stands in a file of its own, so that configs and results name the file alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(min_length=1, description="A file of text; white space around it is no part of the key.")


Key = StrictInt | Annotated[StrictStr, Field(min_length=1)] | KeyFile
"""A key as a config has it."""


def secret(key: Key, watermark: str) -> int:
    """Hash a key to a signed 64-bit number: another one for each kind of watermark.

    Args:
        key: as the config has it.
        watermark: the kind, at most 16 letters.

    Raises:
        ConfigError: its file cannot be read, or is empty.
    """
    text = _read(key.file, watermark) if isinstance(key, KeyFile) else str(key)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=watermark.encode()).digest()
    return int.from_bytes(digest, "little", signed=True)


def _read(file: str, watermark: str) -> str:
    where = f"plugins.{watermark}.key.file"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(where, f"a file of text that can be read, not {file!r}: {reason}")]) from error
    if not text:
        raise ConfigError([Problem(where, f"a file that holds a key, and {file!r} is empty")])
    return text
