"""Stochastic beam search: draw `width` different texts, as if one were drawn after the other without replacement.

The texts with the k largest Gumbel-perturbed log-probabilities are a sample without replacement (Gumbel-top-k). They
are found without looking at all texts: the largest perturbed value below a node of the tree is Gumbel noise around the
log-probability of that node, so noise is drawn from the top down, each child's on condition that the largest of them
is its parent's, and a beam search by these values finds the k largest leaves. Their order is the order of the draws.

    phi(child) = phi(parent) + log p(token | parent),   g(child) ~ Gumbel(phi(child)),   Z = max of g over all siblings
    G(child)   = -log(exp(-G(parent)) - exp(-Z) + exp(-g(child)))                          G(prompt) ~ Gumbel(0)

Kool, van Hoof and Welling 2019. A finished text stays in the beam with its G: only the `width` largest of what has
ended and what goes on are kept. An expectation of f is estimated without bias by the sum of weight * f over the texts,

    weight(text) = p / q,   q = 1 - exp(-exp(phi - threshold)),   threshold = the largest G of a text not returned

Costs one forward pass a token with `width` rows, Gumbel noise over their vocabulary and a topk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.rank import best
from unspool_beam.search import refuse_more_than
from unspool_beam.side_by_side import by_request

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step


@dataclass
class Kept:
    """What a request's sample holds beside its beams.

    Args:
        finished: G of each text that has ended and is still among the largest.
        phi: the log-probability of each text that has ended, by its tokens.
        threshold: the largest G that was ever cut: that of the best text that will not be found.
    """

    finished: list[float] = field(default_factory=list)
    phi: dict[tuple[int, ...], float] = field(default_factory=dict)
    threshold: float = -math.inf


class StochasticBeamSearch(Plugin):
    """Keep the children with the largest perturbed log-probabilities. Scores have two columns: G and phi."""

    score_columns = 2

    class Params(Parameters):
        """How many texts."""

        main: ClassVar[str | None] = "width"
        width: int = Field(4, ge=1, le=1024, description="Texts that are drawn, each different.")

    def start(self, request: PreparedRequest) -> int:
        """Begin with one beam on the prompt."""
        refuse_more_than(self.params.width, request)
        return 1

    def widest(self, request: PreparedRequest) -> int:
        """Keep as many branches as there are texts."""
        width: int = self.params.width
        return width

    def open(self, request: PreparedRequest) -> Kept:
        """Begin with no finished text."""
        return Kept()

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Perturb all children below their parents' G, and take the largest of each request.

        One more than the width: the first that is cut is the threshold.
        """
        most = min(self.params.width + 1, logits.shape[-1])
        phi = step.score[:, 1:] + logits.log_softmax(dim=-1)  # [rows, vocab]
        root = -(-step.uniform("stochastic_beam").log()).log()
        parent = torch.where(step.length == 0, root.to(phi.dtype), step.score[:, 0])
        noisy = phi + step.gumbel("stochastic_beam")
        tokens = best(noisy, most)  # [rows, most]: moving siblings below their parent keeps their order
        perturbed = by_request(step, below(noisy.gather(1, tokens), parent))
        chosen = best(perturbed, min(self.params.width + 1, perturbed.shape[1]))
        value, row = perturbed.gather(1, chosen), step.grid.gather(1, chosen // most)
        stream = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        kept = value > -torch.inf
        row, token = row[kept], tokens[row, chosen % most][kept]
        return Growth(row=row, token=token, score=torch.stack([value[kept], phi[row, token]], 1), stream=stream[kept])

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Keep the largest of all that has ended and all that goes on."""
        assert growth.score is not None
        children: list[list[int]] = [[] for _ in step.requests]
        for child, request in enumerate(growth.request.tolist()):
            children[request].append(child)
        perturbed, phi = growth.score.unbind(1)
        texts = _new_tokens(step, growth) if any(growth.finish) else {}
        for own, its_children in zip(step.own(self), children, strict=True):
            standing: list[tuple[float, int | None]] = [(value, None) for value in own.finished]
            standing += [(float(perturbed[child]), child) for child in its_children]
            standing.sort(key=lambda one: -one[0])
            kept, cut = standing[: self.params.width], standing[self.params.width :]
            growth.drop[[child for _, child in cut if child is not None]] = True
            own.finished = [value for value, child in kept if child is None or growth.finish[child] is not None]
            own.phi |= {texts[child]: float(phi[child]) for _, child in kept if child in texts}
            own.threshold = max([own.threshold, *(value for value, _ in cut[:1])])

    def report(self, request: PreparedRequest, own: Kept, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Give log-probabilities, and the weights by which an expectation is estimated. A cancelled search has none."""
        returned, rest = hypotheses[: request.n], hypotheses[request.n :]
        if any(h.token_ids not in own.phi for h in hypotheses):
            return {}
        threshold = max([own.threshold, *(h.score for h in rest[:1] if h.score is not None)])
        phi = [own.phi[h.token_ids] for h in returned]
        log_q = [log_inclusion(value, threshold) for value in phi]
        return {
            "logprobs": phi,
            "threshold": None if threshold == -math.inf else threshold,
            "inclusion": [math.exp(value) for value in log_q],
            "weights": [math.exp(value - q) for value, q in zip(phi, log_q, strict=True)],
        }


def below(perturbed: Tensor, parent: Tensor) -> Tensor:
    """Move Gumbel noise so that its largest value is the parent's: noise on that condition.

    Args:
        perturbed: `[rows, vocab]` independent Gumbel noise around log-probabilities; -inf where there is none.
        parent: `[rows]`.

    Returns:
        `[rows, vocab]`, in the stable form of Kool et al., appendix B.3.
    """
    largest = perturbed.amax(dim=-1, keepdim=True)
    above = parent.unsqueeze(-1)
    v = above - perturbed + _log1mexp(perturbed - largest)
    return above - v.clamp(min=0) - (-v.abs()).exp().log1p()


def _log1mexp(value: Tensor) -> Tensor:
    """Compute log(1 - exp(value)) for value <= 0: near 0 by expm1, else by log1p (Maechler 2012)."""
    return torch.where(value > -math.log(2), (-value.expm1()).log(), (-value.exp()).log1p())


def log_inclusion(phi: float, threshold: float) -> float:
    """Say how likely a text of log-probability `phi` is above the threshold: log(1 - exp(-exp(phi - threshold)))."""
    if threshold == -math.inf:
        return 0.0
    gap = phi - threshold
    if gap < -30:
        return gap  # exp(gap) is so small that it is its own probability
    return math.log(-math.expm1(-math.exp(min(gap, 30.0))))


def _new_tokens(step: Step, growth: Growth) -> dict[int, tuple[int, ...]]:
    """Give the new tokens of each child that has ended."""
    ids, lengths = growth.paths()
    return {
        child: tuple(ids[child, len(step.requests[request].prompt_ids) : int(lengths[child])].tolist())
        for child, request in enumerate(growth.request.tolist())
        if growth.finish[child] is not None
    }
