"""Proving: cases are drawn until a law is found broken, and what was found is shrunk to the least that breaks it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.errors import Unsatisfiable

from unspool_testing.account import account
from unspool_testing.case import Case
from unspool_testing.law import Law
from unspool_testing.subject import Subject

_SETTINGS = settings(
    deadline=None,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)
_PHASES = (Phase.explicit, Phase.generate)


@dataclass(frozen=True)
class Verdict:
    """What became of one law.

    Args:
        law: which.
        status: it held in all cases, was broken in one, or says nothing about this plugin.
        reason: why it says nothing, or how it was broken; one line.
        counterexample: the smallest case that was found, what happened in it, and a test that reproduces it.
        case: that case.
        examples: how many cases were tried.
        seconds: how long it took.
    """

    law: Law
    status: Literal["held", "broken", "not_applicable"]
    reason: str = ""
    counterexample: str = ""
    case: Case | None = None
    examples: int = 0
    seconds: float = 0.0


def applicable(law: Law, subject: Subject) -> str | None:
    """Say why a law says nothing about a plugin, or None where it does."""
    return law.excuse(subject)


def prove(
    law: Law,
    subject: Subject,
    *,
    examples: int | None = None,
    seed: int = 0,
    shrink: bool = True,
    progress: Callable[[int], None] = lambda tried: None,
) -> Verdict:
    """Try to break a law.

    Args:
        law: which.
        subject: the plugin.
        examples: how many cases to try; None: as many as the law thinks right.
        seed: chooses the cases.
        shrink: look for the smallest case that breaks it; else any will do.
        progress: called with the number of cases that were tried.
    """
    if reason := applicable(law, subject):
        return Verdict(law, "not_applicable", reason)
    started, tried = time.monotonic(), 0
    worst: tuple[Case, Exception] | None = None
    threads = torch.get_num_threads()

    def examine(case: Case) -> None:
        nonlocal tried, worst
        tried += 1
        progress(tried)
        try:
            law.check(case, subject.known)
        except Exception as error:
            worst = case, error  # the last to fail is the smallest: it is run once more at the end
            raise

    count = law.examples if examples is None else examples
    phases = (*_PHASES, Phase.shrink) if shrink else _PHASES
    run = settings(_SETTINGS, max_examples=count, phases=phases)
    search = hypothesis.seed(seed)(run(hypothesis.given(law.cases(subject))(examine)))
    torch.set_num_threads(1)  # tensors are tiny: threads only wait for each other
    try:
        search()
    except Unsatisfiable:
        return Verdict(law, "not_applicable", "no case could be drawn: it refuses all that this law needs")
    except Exception:
        if worst is None:
            raise
    finally:
        torch.set_num_threads(threads)
    if worst is None:
        return Verdict(law, "held", examples=tried, seconds=time.monotonic() - started)
    case, error = worst
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    told = account(law, subject, case, error)
    return Verdict(law, "broken", reason, told, case, tried, time.monotonic() - started)
