"""Turns: all sides do the same job one after another, again and again, so a change of the machine's speed meets all."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from peers.protocol import Answer, Job
from peers.sides import Failed, Side

VOCABULARY = 49152


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Make prompts of random token ids. Every round has its own, so that none is answered from a cache."""
    chance = random.Random(seed)
    return [[chance.randrange(100, VOCABULARY) for _ in range(length)] for length in lengths]


@dataclass
class Outcome:
    """What came of one side's turns."""

    rounds: dict[int, Answer] = field(default_factory=dict)
    reason: str | None = None
    """Why it was not run, or not to the end."""


def take_turns(
    sides: Sequence[Side], job_of: Callable[[int], Job], rounds: int, needs: str, progress: Callable[[str], None]
) -> dict[str, Outcome]:
    """Let all sides that can do a job do it in turn.

    Args:
        sides: who takes part.
        job_of: makes the job of a round.
        rounds: that are counted. A short one before warms up.
        needs: what a side must offer.
        progress: is told who has finished a turn.

    Returns:
        What came of each side, by name.
    """
    outcomes = {side.name: Outcome() for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            outcome = outcomes[side.name]
            if outcome.reason is None:
                try:
                    side.start()
                    if needs not in side.offers:
                        outcome.reason = "cannot do it"
                    elif number == 0:
                        side.run(_short(job_of(0)))
                    else:
                        outcome.rounds[number] = side.run(job_of(number))
                except Failed as error:
                    outcome.reason = str(error)
            progress(side.name)
    return outcomes


def _short(job: Job) -> Job:
    """Make a job short: few tokens, and of long prompts few."""
    few = job.prompts if sum(map(len, job.prompts)) < 1 << 14 else job.prompts[:2]
    return replace(job, prompts=few, new=min(job.new, 8))


@contextmanager
def told(total: int) -> Iterator[Callable[[str], None]]:
    """Tell on the standard error how many turns of `total` were taken, and by whom."""
    done, start, screen = 0, 0.0, sys.stderr.isatty()

    def progress(what: str) -> None:
        nonlocal done, start
        start = start or time.monotonic()  # of the first turn's end: what came before was loading
        left = (time.monotonic() - start) / max(done, 1) * (total - done - 1)
        done += 1
        line = f"{done}/{total} turns, about {left / 60:.0f} min left: {what}"
        print(f"\r\033[K{line}" if screen else line, end="" if screen else "\n", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if screen:
            print(file=sys.stderr)
