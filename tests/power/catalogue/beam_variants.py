"""Faults in beam searches with groups, with phrases, and without replacement."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_beam import constrained, stochastic
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
        phrases=[[1, 1, 0]],  # ids that the smallest model has
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
        "phrases that begin alike all count, so that to finish one looks like no progress",
        "constrained_beam",
        "reference",
        edit(
            vars(Progress)["bank"].fget,
            "begun = max((max(said) for said in self.said if said is not None), default=0)",
            "begun = sum(max(said) for said in self.said if said is not None)",
        ),
        phrases=[[0, 1], [0, 0]],
        width=2,
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
    fault(
        "children are perturbed anew, not below their parent's G",
        "stochastic_beam",
        "reference",
        edit(
            StochasticBeamSearch.select,
            "below(noisy.gather(1, tokens), parent)",
            "noisy.gather(1, tokens)",
        ),
    ),
    fault(
        "noise lies around the last log-probability, not around their sum",
        "stochastic_beam",
        "reference",
        edit(
            StochasticBeamSearch.select,
            "phi = step.score[:, 1:] + logits.log_softmax(dim=-1)",
            "phi = logits.log_softmax(dim=-1)",
        ),
    ),
    fault(
        "the parent's log-probability stands in for its G",
        "stochastic_beam",
        "reference",
        edit(
            StochasticBeamSearch.select, "root.to(phi.dtype), step.score[:, 0]", "root.to(phi.dtype), step.score[:, 1]"
        ),
    ),
    fault(
        "siblings' largest value is taken over all rows",
        "stochastic_beam",
        "reference",
        edit(stochastic.below, "perturbed.amax(dim=-1, keepdim=True)", "perturbed.amax()"),
    ),
    fault(
        "forks draw the same noise",
        "stochastic_beam",
        "reference",
        edit(
            StochasticBeamSearch.select,
            "stream = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)",
            "stream = torch.zeros_like(chosen)",
        ),
    ),
    fault(
        "the totals of an earlier step's penalties are lost",
        "diverse_beam",
        "reference",
        edit(
            DiverseBeamSearch.select, "totals = step.score[:, :1] + logprobs", "totals = step.score[:, 1:] + logprobs"
        ),
        width=4,
        groups=2,
    ),
    fault(
        "end tokens count as taken",
        "diverse_beam",
        "reference",
        edit(DiverseBeamSearch.select, "(value > -torch.inf) & ~ends.gather(1, token)", "(value > -torch.inf)"),
        width=4,
        groups=2,
    ),
    fault(
        "all groups finish into one pool",
        "diverse_beam",
        "reference",
        edit(
            DiverseBeamSearch.stop_check,
            "[pool for of_request in step.own(self) for pool in of_request]",
            "[of_request[0] for of_request in step.own(self) for _ in of_request]",
        ),
        width=4,
        groups=2,
    ),
    fault(
        "beams of a group are those with its stream, not its stream modulo the groups",
        "diverse_beam",
        "reference",
        edit(DiverseBeamSearch.select, "streams.append((group + groups * place)", "streams.append((group + place)"),
    ),
    fault(
        "the best two groups come first, whatever their groups",
        "diverse_beam",
        "reference",
        edit(DiverseBeamSearch.rank, "return [h for texts in rounds", "return ranked or [h for texts in rounds"),
        width=4,
        groups=2,
    ),
    fault(
        "a penalty is paid once, however many beams took the token",
        "diverse_beam",
        "reference",
        edit(
            DiverseBeamSearch.select,
            "taken.scatter_add_(1, token, goes_on.to(taken.dtype))",
            "taken.scatter_reduce_(1, token, goes_on.to(taken.dtype), 'amax')",
        ),
    ),
    fault(
        "a group is over by what it goes by, not by what texts score",
        "diverse_beam",
        "reference",
        edit(
            DiverseBeamSearch.stop_check,
            "total = growth.score[:, 0 if self.params.penalized_scores else 1]",
            "total = growth.score[:, 1 if self.params.penalized_scores else 0]",
        ),
    ),
)
