"""Faults in beam search."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_beam.beam import BeamSearch
from unspool_beam.pool import Pool
from unspool_beam.search import Search, candidates, lengths_after

FAULTS: tuple[Fault, ...] = (
    fault(
        "beam search ranks finished texts before the length penalty",
        "beam",
        "scores_add_up",
        edit(Search.settle, "total[child] / self.weight(lengths[child])", "total[child]"),
    ),
    fault(
        "beam search forgets the parent's score",
        "beam",
        "scores_add_up",
        edit(BeamSearch.select, "step.score[:, :1] + self.logprobs(logits)", "self.logprobs(logits)"),
    ),
    fault(
        "beam search counts lengths without the end token",
        "beam",
        "scores_add_up",
        edit(lengths_after, "+ 1).tolist()", ").clamp(min=1).tolist()"),
    ),
    fault(
        "beam search forgets the last of its finished texts",
        "beam",
        "reference",
        edit(Search.settle, "elif place < width:", "elif place < max(1, width - 1):"),
    ),
    fault(
        "beam search takes no more candidates than beams",
        "beam",
        "reference",
        edit(candidates, "max(2, 1 + len(request.end_ids)) * width", "width"),
        width=2,
        early_stopping="never",
    ),
    fault(
        "beam search is over with the first finished text",
        "beam",
        "reference",
        edit(Pool.is_enough, "len(self.scores) == self.width", "len(self.scores) > 0"),
    ),
    fault(
        "beam search takes the beams of another request for its own",
        "beam",
        "batch_invariance",
        edit(BeamSearch.select, "row = step.grid.gather(1, chosen // vocab)", "row = (chosen // vocab)"),
    ),
)
