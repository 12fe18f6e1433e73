"""Faults in the strategies that draw many texts."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import Declaration, edit
from unspool_many import draws, utilities
from unspool_many.draws import Draws
from unspool_many.particles import Particles
from unspool_many.self_consistency import SelfConsistency

FAULTS: tuple[Fault, ...] = (
    fault(
        "best of n divides by the length without the end token",
        "best_of",
        "scores_add_up",
        edit(draws.mean_logprob, "max(1, len(hypothesis.token_ids))", "max(1, len(hypothesis.token_ids) - 1)"),
    ),
    fault(
        "best of n draws all samples with the noise of the first row",
        "best_of",
        "batch_invariance",
        edit(Draws.select, 'step.sample("sample", logits)', '(logits + step.gumbel("sample")[:1]).argmax(dim=-1)'),
    ),
    fault(
        "samples of equal merit come in the order in which they ended",
        "mbr",
        "speculation_is_invisible",
        edit(draws.in_order, "sorted(hypotheses, key=lambda hypothesis: hypothesis.stream)", "list(hypotheses)"),
    ),
    fault(
        "texts without an answer vote for each other",
        "self_consistency",
        "scores_add_up",
        edit(SelfConsistency.rank, "0.0 if answer is None else share[answer]", "share[answer]"),
    ),
    fault(
        "chrF weighs precision and recall and forgets to norm their sum",
        "mbr",
        "scores_add_up",
        edit(utilities.chrf, "(1 + BETA**2) * precision", "BETA**2 * precision"),
    ),
    fault(
        "the end token is a part of the text that is compared",
        "mbr",
        "scores_add_up",
        edit(draws.text_of, "hypothesis.token_ids[:-1] if ended else hypothesis.token_ids", "hypothesis.token_ids"),
    ),
    fault(
        "particles of one ancestor keep its stream",
        "particles",
        "stop_is_exact",
        edit(Particles._ancestors, "row[parent], places, score[parent]", "row[parent], stream[parent], score[parent]"),
    ),
    fault(
        "particles count the resamplings of all requests as the first one's",
        "particles",
        "batch_invariance",
        edit(Particles.stop_check, "own = populations[request]\n", "own = populations[0]\n"),
    ),
    fault(
        "particles of all requests share one effective size",
        "particles",
        "batch_invariance",
        edit(Particles._ancestors, "effective_size(score[:, 0]) <", "effective_size(table[:, 3]) <"),
    ),
    fault(
        "particles are drawn anew with the seed of the batch's first request",
        "particles",
        "batch_invariance",
        edit(Particles._ancestors, "torch.tensor(request.seed)", "torch.tensor(step.requests[0].seed)"),
        resample_below=1.0,
    ),
    fault(
        "particles draw at the position of the batch's first row",
        "particles",
        "batch_invariance",
        edit(Particles.select, "step.length[row] + 1", "step.length[:1] + 1"),
    ),
    fault(
        "particles are weighed by the whole potential with every token",
        "particles",
        "scores_add_up",
        edit(Particles.stop_check, "potential - score[:, 1]", "potential"),
        target="pipeline",
        potential="distinct",
        resample_below=0.0,
    ),
    fault(
        "particles are declared to be row-local",
        "particles",
        "speculation_is_invisible",
        Declaration(Particles, "row_local", True),
    ),
)
