"""Faults in beam searches with groups, with phrases, and without replacement."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_beam import constrained
from unspool_beam.constrained import ConstrainedBeamSearch
from unspool_beam.diverse import DiverseBeamSearch
from unspool_beam.phrases import Phrase, Progress
from unspool_beam.stochastic import StochasticBeamSearch

FAULTS: tuple[Fault, ...] = (
    fault(
        "a group also pays for candidates that it will not keep",
        "diverse_beam",
        "reference",
        edit(
            DiverseBeamSearch.select,
            "goes_on &= goes_on.cumsum(1) <= self._each",
            "goes_on &= goes_on.cumsum(1) <= 2 * self._each",
        ),
    ),
    fault(
        "groups are those of the batch, not of the request",
        "diverse_beam",
        "batch_invariance",
        edit(
            DiverseBeamSearch.select,
            "taken.scatter_add_(1, token, goes_on.to(taken.dtype))",
            "taken += torch.zeros_like(taken).scatter_add_(1, token, goes_on.to(taken.dtype)).sum(0)",
        ),
    ),
    fault(
        "texts are ranked by what the search goes by, penalties and all",
        "diverse_beam",
        "scores_add_up",
        edit(DiverseBeamSearch.stop_check, "0 if self.params.penalized_scores else 1", "0"),
    ),
    fault(
        "a phrase that was broken off begins again at the next token",
        "constrained_beam",
        "reference",
        edit(Phrase.after, "said = self.back[said - 1]", "said = 0"),
        phrases=[[1, 1, 2]],
        width=3,
    ),
    fault(
        "all places that a bank leaves free are lost",
        "constrained_beam",
        "reference",
        edit(constrained.allot, "return {*kept, *left[: width - len(kept)]}", "return {*kept}"),
    ),
    fault(
        "a text may end with a phrase unmet",
        "constrained_beam",
        "reference",
        edit(
            ConstrainedBeamSearch._without_early_ends,
            "if not progress.met]",
            "if not progress.met and False]",
        ),
    ),
    fault(
        "what brings a phrase on is no candidate of its own",
        "constrained_beam",
        "reference",
        edit(
            ConstrainedBeamSearch.select,
            "{likeliest[row], *progress[row].next_tokens()}",
            "{likeliest[row]}",
        ),
        width=1,
    ),
    fault(
        "a phrase that was said can be unsaid",
        "constrained_beam",
        "reference",
        edit(Progress.after, "said.append(None if met else now)", "said.append(now)"),
    ),
    fault(
        "stochastic beams take what has ended in another request for their own",
        "stochastic_beam",
        "batch_invariance",
        edit(
            StochasticBeamSearch.stop_check,
            "for own, its_children in zip(step.own(self), children, strict=True):",
            "for own, its_children in zip(reversed(step.own(self)), children, strict=True):",
        ),
    ),
)
