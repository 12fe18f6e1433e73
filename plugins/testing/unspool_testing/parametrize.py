"""The laws as parametrized tests: one test for each law that says something about a plugin.

@parametrize_with_laws("beam", expected_failures={"scores_add_up": "its scores are normalised by length"})
def test_beam(law: Callable[[], None]) -> None:
    law()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from unspool_testing.expected import check_expected, laws_of
from unspool_testing.law import Law
from unspool_testing.proof import prove
from unspool_testing.subject import Subject


class LawBroken(pytest.fail.Exception, AssertionError):  # type: ignore[name-defined, misc]  # mypy sees no class there
    """A law that a plugin breaks; the message is the counterexample.

    It is a failure of pytest's own kind as well, so that what pytest prints is that text alone, ready to be pasted.
    """

    __module__ = "builtins"  # as pytest does with its own: what it prints then is the name alone

    def __init__(self, counterexample: str) -> None:
        super().__init__(counterexample, pytrace=False)  # type: ignore[call-arg]


@dataclass(frozen=True)
class LawOfPlugin:
    """A law about one plugin: call it to have it proven.

    Args:
        law: which.
        subject: the plugin.
        examples: how many cases are tried; None: as many as the law thinks right.
        seed: chooses the cases.
    """

    law: Law
    subject: Subject
    examples: int | None = None
    seed: int = 0

    def __call__(self) -> None:
        """Try to break the law.

        Raises:
            AssertionError: it is broken; the message is the counterexample.
        """
        __tracebackhide__ = True
        verdict = prove(self.law, self.subject, examples=self.examples, seed=self.seed)
        if verdict.status == "broken":
            raise LawBroken(verdict.counterexample)

    def __repr__(self) -> str:
        return f"{self.law.name} of {self.subject.name}"


def parametrize_with_laws(
    plugin: object,
    *,
    expected_failures: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    examples: int | None = None,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Parametrize a test's argument `law` with the laws that say something about a plugin.

    Args:
        plugin: as in `Subject.find`: the name of an installed plugin, a class, an object.
        expected_failures: law -> the reason why the plugin breaks it. One that it keeps after all fails.
        params: parameters to keep; the others are drawn from their bounds.
        examples: how many cases are tried; None: as many as each law thinks right.
        seed: chooses the cases.

    Raises:
        ConfigError: no such plugin, or it does not take these parameters.
        InputError: it is no plugin, or a failure is expected of a law that does not exist or does not apply.
    """
    subject = Subject.find(plugin, params=params)
    expected = expected_failures or {}
    check_expected(expected, subject)
    return pytest.mark.parametrize(
        "law",
        [
            pytest.param(
                LawOfPlugin(law, subject, examples, seed),
                id=law.name,
                # Only a broken law is expected: a fault of the kit or of the test stays an error.
                marks=[pytest.mark.xfail(reason=expected[law.name], strict=True, raises=AssertionError)]
                if law.name in expected
                else (),
            )
            for law in laws_of(subject)
        ],
    )
