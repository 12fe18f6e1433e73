"""A request while it lives: everything about it that changes, in one place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from unspool.request import Drafted, Hypothesis, PreparedRequest, Result, Stats
from unspool.worth import Record

if TYPE_CHECKING:
    from unspool.group import Draft
    from unspool.lane import Lane, Track

Logprobs = tuple["Logprobs", float] | None
"""Log-probabilities along a path, shared between branches: the last one, after those before it."""


@dataclass(eq=False, slots=True)
class Held:
    """What a held row keeps until the next step: its readings, and the drafts that `select` hung below it."""

    readings: Mapping[Any, Tensor]
    drafts: dict[int, Draft]


@dataclass(eq=False, slots=True)
class Branch:
    """What a strategy grows: a node, a noise stream, a score."""

    node: int
    stream: int
    score: tuple[float, ...]
    logprobs: Logprobs = None
    held: Held | None = None
    states: tuple[Any, ...] = ()
    """Its own path states. Those that read log-probabilities may differ from another stream's on the same node."""


@dataclass(eq=False, slots=True)
class Counts:
    """The running counts behind `Stats`."""

    forward_passes: int = 0
    rows: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    drafts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By drafter: (drafts that were run, those of them that were accepted) at each depth below the branch, from 1."""
    preemptions: int = 0
    started: float | None = None
    first_token: float | None = None

    def note_draft(self, drafter: str, depth: int, accepted: bool) -> None:
        """Count a draft that was run."""
        by_depth = self.drafts.setdefault(drafter, [])
        by_depth += [(0, 0)] * (depth - len(by_depth))
        ran, right = by_depth[depth - 1]
        by_depth[depth - 1] = ran + 1, right + accepted


@dataclass(eq=False)
class Live:
    """One live request. `branches` is empty when it has ended."""

    request: PreparedRequest
    order: int
    """Its age: the smaller, the earlier it was submitted."""
    root: int
    widest: int = 1
    """Branches that its strategy keeps at most."""
    branches: list[Branch] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)
    tracks: dict[Lane, Track] = field(default_factory=dict)
    drafts: list[int] = field(default_factory=list)
    """Drafts of this step that may still be pruned, in the order in which they were hung."""
    counts: Counts = field(default_factory=Counts)
    submitted: float = field(default_factory=time.monotonic)
    accepted: int = 0
    """Drafts accepted in its last step."""
    record: Record = field(default_factory=lambda: Record(keep=0.9, fade=0.98))
    """How often its drafts were right of late."""
    scored: bool = False
    """Its strategy or the core has scored something."""
    dead_path: tuple[int, ...] | None = None
    error: Exception | None = None
    result: Result | None = None

    @property
    def held_drafts(self) -> list[int]:
        """List the drafts below held rows that run; branches on one node share theirs."""
        held = [branch.held.drafts for branch in self.branches if branch.held]
        return list(dict.fromkeys(node for drafts in held for node, draft in drafts.items() if draft.runs))

    @property
    def deadline(self) -> float | None:
        """Give the moment of its deadline on the monotonic clock."""
        seconds = self.request.limits.deadline
        return None if seconds is None else self.submitted + seconds

    def stats(self, hypotheses: tuple[Hypothesis, ...]) -> Stats:
        """Freeze the counts."""
        counts, now = self.counts, time.monotonic()
        return Stats(
            forward_passes=counts.forward_passes,
            rows=counts.rows,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=counts.cached_tokens,
            new_tokens=sum(len(h.token_ids) for h in hypotheses),
            drafted=counts.drafted,
            accepted=counts.accepted,
            drafters={
                name: Drafted(*map(tuple, zip(*by_depth, strict=True))) for name, by_depth in counts.drafts.items()
            },
            preemptions=counts.preemptions,
            queued_s=(counts.started or now) - self.submitted,
            first_token_s=(counts.first_token or now) - self.submitted,
            total_s=now - self.submitted,
        )


def logprob_list(logprobs: Logprobs) -> tuple[float, ...]:
    """Unroll the log-probabilities of a path, first token first."""
    values = []
    while logprobs is not None:
        logprobs, value = logprobs
        values.append(value)
    return tuple(reversed(values))
