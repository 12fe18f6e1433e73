"""Proving several laws at once: a process for each core, where processes can be had cheaply and safely."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch

from unspool_testing.law import Law
from unspool_testing.laws import LAWS
from unspool_testing.proof import Verdict, prove
from unspool_testing.subject import Subject


@contextmanager
def prove_all(
    laws: Sequence[Law], subject: Subject, *, jobs: int | None = None, examples: int | None = None, seed: int = 0
) -> Iterator[Iterator[Verdict]]:
    """Prove laws, and give an iterator over the verdicts as they come. The verdicts do not depend on `jobs`.

    Args:
        laws: which; each must be one of `LAWS`.
        subject: the plugin.
        jobs: how many processes at most; None: as many as there are cores for us.
        examples: how many cases are tried; None: as many as each law thinks right.
        seed: chooses the cases.
    """
    jobs = min(_cores() if jobs is None else jobs, len(laws))
    # Elsewhere a fork is not safe, and a fresh process would take longer to import torch than most laws take.
    if jobs < 2 or sys.platform != "linux":
        yield (prove(law, subject, examples=examples, seed=seed) for law in laws)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(subject,)) as pool:
        # All processes are forked by the first of these calls, before a caller starts threads of its own.
        running = [pool.submit(_proven, law.name, examples, seed) for law in laws]
        try:
            yield (_verdict(done.result()) for done in as_completed(running))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# ---- in the other processes, which have one subject each -------------------------------------------------------------

_SUBJECT: Subject


def _begin(subject: Subject) -> None:
    global _SUBJECT  # noqa: PLW0603 - a subject cannot be pickled: it comes by the fork
    _SUBJECT = subject
    torch.set_num_threads(1)  # a thread pool does not survive a fork, and the models are tiny


def _proven(name: str, examples: int | None, seed: int) -> dict[str, Any]:
    verdict = prove(LAWS[name], _SUBJECT, examples=examples, seed=seed)
    found = {field.name: getattr(verdict, field.name) for field in dataclasses.fields(verdict)}
    return {**found, "law": name}  # a law cannot be pickled either


def _verdict(found: dict[str, Any]) -> Verdict:
    return Verdict(**{**found, "law": LAWS[found["law"]]})
