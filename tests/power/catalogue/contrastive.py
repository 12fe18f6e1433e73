"""Faults in decoding by contrast."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool.distributions import divergence, log_ratio
from unspool.likeness import _cosines, nearest
from unspool_contrastive.decoding import ContrastiveDecoding
from unspool_contrastive.dola import Dola
from unspool_contrastive.guidance import Guidance
from unspool_contrastive.search import ContrastiveSearch

FAULTS: tuple[Fault, ...] = (
    fault(
        "contrastive search compares candidates with the padding of shorter paths",
        "contrastive_search",
        "batch_invariance",
        edit(nearest, "cosines.masked_fill(~there.unsqueeze(1), -torch.inf)", "cosines"),
    ),
    fault(
        "contrastive search compares a candidate with the path's mean, not with its nearest token",
        "contrastive_search",
        "reference",
        edit(
            nearest,
            "cosines.masked_fill(~there.unsqueeze(1), -torch.inf).amax(dim=-1)",
            "cosines.masked_fill(~there.unsqueeze(1), 0.0).sum(dim=-1) / there.sum(dim=1, keepdim=True)",
        ),
    ),
    fault(
        "contrastive search takes products of hidden states for cosines",
        "contrastive_search",
        "reference",
        edit(
            _cosines,
            ("candidates, path = normalize(candidates, dim=-1), path.to(candidates)", "path = path.to(candidates)"),
            (" / norms.unsqueeze(1)", ""),
        ),
    ),
    fault(
        "contrastive search measures the likeness of the row, not of its candidate",
        "contrastive_search",
        "reference",
        edit(ContrastiveSearch._choose, "step.hidden(LAST, node)", "step.hidden(LAST)[row]"),
    ),
    fault(
        "contrastive search takes logits for probabilities",
        "contrastive_search",
        "reference",
        edit(
            ContrastiveSearch._choose,
            "logits.log_softmax(dim=-1).gather(1, tokens).exp()",
            "logits.gather(1, tokens)",
        ),
    ),
    fault(
        "contrastive search puts the weight of the likeness on the probability",
        "contrastive_search",
        "reference",
        edit(ContrastiveSearch._choose, "(1 - self.params.alpha) * confidence", "self.params.alpha * confidence"),
    ),
    fault(
        "contrastive search counts the candidates of all rows as one row's",
        "contrastive_search",
        "batch_invariance",
        edit(ContrastiveSearch._choose, "numbers - torch.searchsorted(row, row)", "numbers % self._most(logits)"),
    ),
    fault(
        "contrastive search takes forbidden tokens for candidates",
        "contrastive_search",
        "reference",
        edit(ContrastiveSearch._look, "> 0", ">= 0"),
    ),
    fault(
        "a contrast keeps what is plausible by the sum of log-probabilities",
        "dola",
        "reference",
        edit(log_ratio, "+ alpha.log()", "* alpha"),
    ),
    fault(
        "a contrast takes the best token of all rows for that of a row",
        "contrastive_decoding",
        "batch_invariance",
        edit(log_ratio, "logits.amax(dim=-1, keepdim=True)", "logits.amax()"),
    ),
    fault(
        "a contrast subtracts the other's logits for its log-probabilities",
        "dola",
        "reference",
        edit(log_ratio, "others.to(logits).log_softmax(dim=-1)", "others.to(logits)"),
    ),
    fault(
        "contrastive decoding cools the expert's share of O'Brien's form",
        "contrastive_decoding",
        "reference",
        edit(ContrastiveDecoding.logits_transform, "gain=1 + beta if", "gain=1 - beta if"),
    ),
    fault(
        "contrastive decoding heats an amateur that it should cool",
        "contrastive_decoding",
        "reference",
        edit(ContrastiveDecoding.logits_transform, ".to(logits) / temperature", ".to(logits) * temperature"),
    ),
    fault(
        "contrastive decoding takes the parameters of its first request for everybody's",
        "contrastive_decoding",
        "batch_invariance",
        edit(
            ContrastiveDecoding.logits_transform,
            "step.values(self, field).to(logits)",
            "step.values(self, field).to(logits)[:1]",
        ),
    ),
    fault(
        "DoLa chooses one layer for the whole batch",
        "dola",
        "batch_invariance",
        edit(
            Dola.logits_transform,
            "distances.max(dim=0)",
            "distances.mean(dim=1, keepdim=True).expand_as(distances).max(dim=0)",
        ),
    ),
    fault(
        "DoLa takes the layer that is nearest to the final one",
        "dola",
        "reference",
        edit(Dola.logits_transform, "distances.max(dim=0)", "(1 - distances).max(dim=0)"),
    ),
    fault(
        "DoLa measures layers against the logits that plugins before it left",
        "dola",
        "reference",
        edit(Dola.logits_transform, "divergence(step.raw, early)", "divergence(logits, early)"),
    ),
    fault(
        "a Jensen-Shannon divergence is half a Kullback-Leibler one",
        "dola",
        "reference",
        edit(
            divergence,
            "_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2",
            "(torch.xlogy(p, p) - torch.xlogy(p, (p + q) / 2)).sum(dim=-1) / 2",
        ),
    ),
    fault(
        "guidance pushes away from logits, and spoils what is forbidden",
        "guidance",
        "reference",
        edit(Guidance.logits_transform, "(said - negative)", "(logits - negative)"),
    ),
    fault(
        "guidance adds the whole scale to a distribution that has one already",
        "guidance",
        "reference",
        edit(Guidance.logits_transform, ".unsqueeze(-1) - 1)", ".unsqueeze(-1))"),
    ),
    fault(
        "guidance reads its scale from the first request of the group",
        "guidance",
        "batch_invariance",
        edit(
            Guidance.logits_transform,
            'step.values(self, "scale").to(logits).unsqueeze(-1)',
            "self.params.scale",
        ),
    ),
    fault(
        "guidance without a negative prompt begins with the prompt's first token",
        "guidance",
        "reference",
        edit(Guidance._negative_prompt, "request.prompt_ids[-1:]", "request.prompt_ids[:1]"),
    ),
)
