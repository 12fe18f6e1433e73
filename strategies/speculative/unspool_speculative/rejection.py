"""Rejection sampling: accept what a draft model drew as often as the target would have drawn it.

A draft model q draws a few tokens ahead, and the target p sees all of them in one pass. Each is accepted with the
probability with which p may take over what q drew; the first that is rejected is replaced by a draw from what p has and
q lacks. So each token is drawn exactly from p. But it is not the token that `sample` would draw: which draft meets
which number depends on where the drafts before it ended.

    x       ~  q                                               at each node of the chain, q transformed as p is
    accept  x  if  r < p(x) / q(x),   r uniform in (0, 1)      (Leviathan et al. 2023; Chen et al. 2023)
    else       draw from  max(p - q, 0) / sum of max(p - q, 0)
    all accepted:  draw one more from p

With several streams (`n`), one that is rejected may draw a token that another's drafts have run. It waits there for the
next step and for drafts of its own (`Growth.waits`): going on without would draw from p too, but other tokens than it
draws alone, and a stream is the same however many there are.

One token of p comes of each draft that is looked at: min(p, q) if accepted, max(p - q, 0) else. For that no draft may
be left out for what it is, an end or one over a limit, nor for want of room: the length is fixed, and a drafter that
minds the load has no place here. With `drafter: prompt_lookup` q is certain of what followed the same words before.

Costs a pass of the target with `length` + 1 rows a branch, and `length` passes of the draft model, for
(1 - a^(length + 1)) / (1 - a) tokens in the mean, where a is the mean of the sum of min(p, q).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import one_hot

from unspool import noise
from unspool.hooks import Growth
from unspool.noise import draw
from unspool.plugin import Companion, Parameters, Plugin, hookimpl
from unspool_speculative.prompt_lookup import PromptLookup, follow, longest_match

if TYPE_CHECKING:
    from typing import Self

    from unspool.pipeline import Pipeline
    from unspool.request import PreparedRequest
    from unspool.step import Step

Place = tuple[int, int]
"""Stream and node. Where streams share a node each has a draft of its own below it, or none."""
Drawn = tuple[int, Tensor | None]
"""A draft's token, and the distribution `[vocab]` float64 that it was drawn from; None: it was certain."""


class Rejection(Plugin):
    """Draft by draws from another distribution, and correct them to the target's."""

    row_local = True

    class Params(Parameters):
        """Who drafts, and how far."""

        main: ClassVar[str | None] = "model"
        model: str | None = Field(
            None,
            min_length=1,
            description="Draft model: a folder, a hub name or a GGUF file; its tokenizer must be the target's.",
            examples=[None],
        )
        layers: int | None = Field(
            None, ge=1, description="Draft model: the first so many layers, of `model` or of the target.", examples=[1]
        )
        drafter: Literal["prompt_lookup"] | None = Field(
            None, description="Instead of a draft model: what followed the same words before."
        )
        length: int = Field(4, ge=1, le=64, description="Drafts of a chain, whatever the load.")

        @model_validator(mode="after")
        def _one_drafter(self) -> Self:
            if (self.drafter is None) == (self.model is None and self.layers is None):
                raise ValueError("name one drafter: `model` or `layers` (or both), or else `drafter: prompt_lookup`")
            return self

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the draft model."""
        if self.params.drafter is not None:
            return {}
        return {self.name: Companion(model=self.params.model, layers=self.params.layers)}

    def refuse(self, pipeline: Pipeline) -> str | None:
        """Refuse other drafters."""
        others = [plugin.name for plugin in pipeline.plugins if plugin is not self and hasattr(plugin, "pre_forward")]
        if not others:
            return None
        return (
            f"it draws its own drafts, and those of {', '.join(map(repr, others))} are no draws from its q: "
            f"name the drafter in its parameters, or let another strategy choose ('sample')"
        )

    def open(self, request: PreparedRequest) -> dict[Place, Drawn]:
        """Begin without drafts. In a step these are the request's own, by the place below which they hang."""
        return {}

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang a chain below each row, and note what was drawn and from what."""
        request, stream, owns = step.request.tolist(), step.stream.tolist(), step.own(self)
        below: list[dict[Place, Drawn]] = [{} for _ in owns]
        for row, node, drawn in self._look_up(step) if self.params.drafter else self._run_ahead(step):
            below[request[row]][stream[row], node] = drawn
        for own, drafts in zip(owns, below, strict=True):
            own.clear()
            own.update(drafts)

    def _run_ahead(self, step: Step) -> Iterable[tuple[int, int, Drawn]]:
        """Draw from the draft model: (row, node, what was drawn there)."""
        rows, nodes = torch.arange(len(step.node), device=step.node.device), step.node
        for depth in range(self.params.length):
            logits = step.transformed(rows, nodes, step.companion(self.name, nodes))
            alive = logits.amax(dim=-1).isfinite()  # below an end or a limit nothing follows
            rows, nodes, logits = rows[alive], nodes[alive], logits[alive]
            if not len(rows):
                return
            tokens = draw(logits, _keys(step, rows, depth, "draft"))
            q = logits.to(torch.float64).softmax(dim=-1)
            for row, node, token, each in zip(rows.tolist(), nodes.tolist(), tokens.tolist(), q, strict=True):
                yield row, node, (token, each)
            nodes = step.draft(nodes, tokens)

    def _look_up(self, step: Step) -> Iterable[tuple[int, int, Drawn]]:
        """Draft what followed the same words before: (row, node, what is certain there)."""
        known = PromptLookup.Params()
        paths, lengths = step.paths()
        ways = []
        for path, length in zip(paths.cpu().numpy(), lengths.tolist(), strict=True):
            matched, end = longest_match(path[:length], known.max_ngram)
            ways.append(follow(path[:length], end, self.params.length) if matched >= known.min_ngram else [])
        going = list(enumerate(step.node.tolist()))
        for depth in range(self.params.length):
            going = [(row, node) for row, node in going if node >= 0 and depth < len(ways[row])]
            tokens = [ways[row][depth] for row, _ in going]
            for (row, node), token in zip(going, tokens, strict=True):
                yield row, node, (token, None)
            nodes = step.draft([node for _, node in going], tokens).tolist()
            going = [(row, node) for (row, _), node in zip(going, nodes, strict=True)]

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Accept or replace each row's draft; draw where it has none."""
        owns, places = step.own(self), zip(step.request.tolist(), step.stream.tolist(), step.node.tolist(), strict=True)
        drafts = [owns[request].get((stream, node)) for request, stream, node in places]
        rows = torch.arange(len(logits), device=logits.device)
        token, rejected, weights = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool), logits
        drafted = [(row, draft) for row, draft in enumerate(drafts) if draft is not None]
        if drafted:
            at = torch.tensor([row for row, _ in drafted], device=logits.device)
            x = torch.tensor([draft for _, (draft, _) in drafted], device=logits.device)
            p = logits[at].to(torch.float64).softmax(dim=-1)
            q = one_hot(x, logits.shape[-1]).to(p)
            for place, (_, (_, drawn_from)) in enumerate(drafted):
                if drawn_from is not None:
                    q[place] = drawn_from
            token[at] = x
            rejected[at] = ~accepts(_of(p, x), _of(q, x), noise.uniform(_keys(step, at, 0, "accept")))
            weights = logits.index_copy(0, at, residual(p, q).log().to(logits.dtype))
        fresh = rejected.nonzero().squeeze(1)
        token[fresh] = draw(weights[fresh], _keys(step, fresh, 0, "sample"))
        return Growth(row=rows, token=token, waits=rejected)  # its own chain has ended, whosever drafts stand there


def accepts(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Say which drafts are accepted: uniform < p / q, never one that the target forbids.

    Args:
        p: `[n]` float64, each draft's probability under the target.
        q: `[n]` float64, its probability under the drafter.
        uniform: `[n]` float64 in (0, 1).

    Returns:
        `[n]` bool.
    """
    return uniform * q < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Give what the target has and the drafter lacks: max(p - q, 0), up to a factor. p itself where nothing is left.

    A draft is rejected there only by rounding.

    Args:
        p: `[n, vocab]` float64.
        q: `[n, vocab]` float64.

    Returns:
        `[n, vocab]` float64, 0 where p is 0.
    """
    left = (p - q).clamp(min=0)
    return left.where(left.sum(dim=-1, keepdim=True) > 0, p)


def _keys(step: Step, rows: Tensor, depth: int, purpose: str) -> Tensor:
    """Key the noise of a token `depth` tokens after the child of each of `rows`: `[n]`."""
    seed = torch.tensor([request.seed for request in step.requests], device=rows.device)[step.request[rows]]
    return noise.key(seed, step.stream[rows], step.length[rows] + 1 + depth, noise.purpose_key(purpose))


def _of(probability: Tensor, token: Tensor) -> Tensor:
    return probability.gather(1, token.unsqueeze(1)).squeeze(1)
