"""The laws that are asked of a plugin, and those that it is known to break, each with a reason.

An expected failure is strict: a plugin that keeps the law after all must say so, or the exception outlives its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unspool.errors import InputError
from unspool.spec import nearest
from unspool_testing.law import Law
from unspool_testing.laws import LAWS
from unspool_testing.proof import applicable
from unspool_testing.subject import Subject


def laws_of(subject: Subject) -> list[Law]:
    """List the laws that say something about a plugin."""
    return [law for law in LAWS.values() if applicable(law, subject) is None]


def find_laws(names: Iterable[str], field: str = "law") -> list[Law]:
    """Find laws by name, in the order in which they are shown; all, if none is named.

    Raises:
        InputError: there is no such law.
    """
    wanted = set(names)
    for name in wanted - LAWS.keys():
        raise InputError(field, name, f"no such law: {nearest(name, LAWS)}laws: {', '.join(LAWS)}")
    return [law for law in LAWS.values() if not wanted or law.name in wanted]


def check_expected(expected: Mapping[str, str], subject: Subject, field: str = "expected_failures") -> None:
    """Check that each failure that is expected can occur, and has a reason.

    Raises:
        InputError: there is no such law, it says nothing about this plugin, or the reason is empty.
    """
    for law in find_laws(expected, field) if expected else ():
        if reason := applicable(law, subject):
            names = ", ".join(other.name for other in laws_of(subject))
            raise InputError(field, law.name, f"it says nothing about {subject.name} ({reason}): allowed: {names}")
        if not expected[law.name].strip():
            raise InputError(field, law.name, "with the reason why it is broken")
