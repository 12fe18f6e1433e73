"""A law: a sentence about every plugin of some kind, a check that finds it broken, and the cases to try it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hypothesis.strategies import SearchStrategy

from unspool.errors import AdmissionError, DeadEnd
from unspool.request import Result
from unspool_testing.case import Case
from unspool_testing.known import Known
from unspool_testing.subject import Subject


class Broken(AssertionError):
    """A law does not hold in some case; the message says how."""


class Check(Protocol):
    """A law's check, as tests call it with a case that was found before."""

    def __call__(self, case: Case | str, known: Known | None = None) -> None:
        """Raise `Broken` where the law does not hold. `case` may be YAML; `known`: the plugins that it names."""
        ...


@dataclass(frozen=True, eq=False)
class Law:
    """A law.

    Args:
        name: how users name it.
        says: the law in one sentence.
        why: what goes wrong for users where it is broken, and what usually breaks it.
        check: raises `Broken` in a case where it does not hold.
        cases: draws cases for a plugin.
        excuse: says why it does not apply to a plugin, or None.
        examples: how many cases are tried, unless a caller says otherwise.
    """

    name: str
    says: str
    why: str
    check: Check
    cases: Callable[[Subject], SearchStrategy[Case]]
    excuse: Callable[[Subject], str | None] = lambda subject: None
    examples: int = 60


def check_of(case_check: Callable[[Case, Known], None]) -> Check:
    """Make a public check of one that takes a case and the known plugins."""

    def check(case: Case | str, known: Known | None = None) -> None:
        case_check(Case.read(case) if isinstance(case, str) else case, known or Known.installed())

    check.__name__ = check.__qualname__ = case_check.__name__
    check.__doc__, check.__module__ = case_check.__doc__, case_check.__module__
    return check


def lawful_end(result: Result, about: str = "") -> bool:
    """Tell whether a request ended with a text. It may have met a dead end or be too large; it may not have failed.

    Raises:
        Broken: a plugin or the model failed.
    """
    if result.error is None:
        return True
    if isinstance(result.error, DeadEnd | AdmissionError):
        return False
    raise Broken(f"{about or f'request {result.id}'} failed: {type(result.error).__name__}: {result.error}")
