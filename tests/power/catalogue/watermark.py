"""Faults in watermarks."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_watermark.green_list import GreenList
from unspool_watermark.tournament import Tournament

FAULTS: tuple[Fault, ...] = (
    fault(
        "green lists are those of the first row",
        "green_list",
        "batch_invariance",
        edit(
            GreenList.logits_transform,
            "self._list.draws(context, vocabulary)",
            "self._list.draws(context[:1], vocabulary)",
        ),
    ),
    fault(
        "a path that is too short for a context is marked all the same",
        "green_list",
        "reference",
        edit(GreenList.logits_transform, " & whole.unsqueeze(-1)", ""),
    ),
    fault(
        "delta is that of the first request of the group",
        "green_list",
        "batch_invariance",
        edit(
            GreenList.logits_transform,
            'step.values(self, "delta").to(logits).unsqueeze(-1)',
            'step.values(self, "delta").to(logits)[0]',
        ),
    ),
    fault(
        "a context that was used before is marked again",
        "tournament",
        "reference",
        edit(Tournament.logits_transform, "marked &= ~had_before(step, context)", "pass"),
    ),
    fault(
        "a tournament is played one layer short",
        "tournament",
        "reference",
        edit(Tournament.logits_transform, "self.params.depth)", "self.params.depth - 1)"),
        depth=2,
    ),
)
