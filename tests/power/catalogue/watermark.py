"""Faults in watermarks."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_watermark.context import had_before, last_tokens
from unspool_watermark.green_list import GreenList, _Lists
from unspool_watermark.tournament import Tournament, play

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
    fault(
        "a context ends where the longest path of the batch ends",
        "green_list",
        "batch_invariance",
        edit(last_tokens, "lengths.unsqueeze(-1) - width", "lengths.amax().expand(len(lengths), 1) - width"),
    ),
    fault(
        "a token's least hash is taken for its draw, which is no fair one",
        "green_list",
        "reference",
        edit(_Lists.draws, "return fold(least, tokens)", "return least"),
        scheme="self_hash",
    ),
    fault(
        "a context that only the prompt has counts as used",
        "tournament",
        "reference",
        edit(had_before, "(chosen >= prompt) & ", ""),
    ),
    fault(
        "all layers of a tournament read the same bit",
        "tournament",
        "reference",
        edit(play, "bits >>= 1", "pass"),
        depth=4,
    ),
)
