"""Arguments of the command line, read from text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any


def settings_of(text: str) -> dict[str, Any]:
    """Read key=value,key=value; a value is JSON where it is, else text."""
    settings = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise argparse.ArgumentTypeError(f"{part!r} is not key=value, an argument of unspool.Engine.load")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Make a reader of names, with commas between them."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return names

    return read


def count(text: str) -> int:
    """Read a number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
