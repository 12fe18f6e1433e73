"""Functions that a config names: an entry point of a group, or `module:attribute`.

Built-in scorers, utilities and potentials come in by the same door as strangers'. A name is looked up when the config
is read, so that a mistake in it is found before a model is loaded. Whoever may write such a name may run that function.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import AfterValidator


@cache
def find(group: str, name: str) -> Callable[..., Any]:
    """Import the function that a name stands for.

    Args:
        group: of the entry points.
        name: one of them, or `module:attribute`.

    Raises:
        ValueError: there is none, or it cannot be imported; the message says what is installed.
    """
    target = name
    if ":" not in name:
        targets = {point.value for point in entry_points(group=group, name=name)}
        if not targets:
            installed = ", ".join(sorted(entry_points(group=group).names))
            raise ValueError(f"no {name!r} in {group}: installed: {installed}; or give module:attribute")
        if len(targets) > 1:
            raise ValueError(f"{name!r} is registered twice in {group}, as {' and '.join(sorted(targets))}")
        (target,) = targets
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"cannot import {target}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{target} is a {type(found).__name__}, and a function is wanted")
    return found  # type: ignore[no-any-return]


def named(group: str) -> AfterValidator:
    """Make the validator of a parameter that names a function of `group`."""

    def known(name: str) -> str:
        find(group, name)
        return name

    return AfterValidator(known)


def finite(value: Any, said: str) -> float:
    """Give a function's answer as a number that can be compared and written down.

    Args:
        value: the answer.
        said: who gave it, for the error.

    Raises:
        ValueError: it is no number, or NaN or infinite.
    """
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{said} gave {value!r}, and a finite number is wanted")
    return number
