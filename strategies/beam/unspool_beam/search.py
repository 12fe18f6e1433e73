"""What all searches with beams share: a width, scores that lengths are weighed into, and an end.

A candidate that ends counts only if it is among the best of its step; then its sum of log-probabilities is weighed by
its length, and it goes into a pool of finished texts. Of the candidates that do not end the best go on. A search is
over when its pool cannot, or need not, get better.

    score(text)  =  sum of log p  /  length ** length_penalty                  (the end token counts in the length)
    gnmt         =  sum of log p  /  ((5 + length) / 6) ** length_penalty                        (Wu et al. 2016)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.plugin import Parameters, Plugin
from unspool_beam.pool import Pool

if TYPE_CHECKING:
    from unspool.hooks import Growth
    from unspool.request import PreparedRequest
    from unspool.step import Step


class Search(Plugin):
    """The base of searches that rank texts by weighed sums of log-probabilities."""

    class Params(Parameters):
        """How wide, how it ends, and how lengths are weighed."""

        main: ClassVar[str | None] = "width"
        width: int = Field(4, ge=1, le=1024, description="Beams, and finished texts that are kept.")
        length_penalty: float = Field(
            1.0, ge=-10, le=10, description="Exponent of the length; above 0 it favours long texts, below 0 short ones."
        )
        length_form: Literal["power", "gnmt"] = Field(
            "power", description="What is raised to it: the length, or (5 + length) / 6."
        )
        early_stopping: bool | Literal["never"] = Field(
            False,
            description="`true`: over when `width` texts have ended; `false`: when the best beam, scored as it is, "
            "would not be among them; `never`: when it could not be at any length.",
        )
        renormalize: bool = Field(
            True,
            description="`false`: take the transformed logits as log-probabilities as they are (transformers; put "
            "`log_softmax` first).",
        )

    def start(self, request: PreparedRequest) -> int:
        """Begin with one beam on the prompt."""
        refuse_more_than(self.params.width, request)
        return 1

    def widest(self, request: PreparedRequest) -> int:
        """Keep as many branches as there are beams."""
        width: int = self.params.width
        return width

    def logprobs(self, logits: Tensor) -> Tensor:
        """Give what is summed up: `[rows, vocab]`."""
        return logits.log_softmax(dim=-1) if self.params.renormalize else logits

    def settle(
        self, step: Step, growth: Growth, search: Sequence[int], pools: Sequence[Pool], width: int, total: Tensor
    ) -> None:
        """Score what ended, cut to the width, and end searches that cannot get better.

        Args:
            step: of the hook.
            growth: the candidates, those of one search best first.
            search: each candidate's number of a search.
            pools: of each search.
            width: of each search.
            total: `[children]` sums of log-probabilities.
        """
        assert growth.score is not None
        score = growth.score if growth.score.dim() == 1 else growth.score[:, 0]
        drop, lengths = growth.drop, lengths_after(step, growth)
        places: dict[int, int] = {}
        running: dict[int, list[int]] = {number: [] for number in range(len(pools))}
        for child, number in enumerate(search):
            place = places[number] = places.get(number, -1) + 1
            if growth.finish[child] is None:
                running[number].append(child)
                drop[child] = len(running[number]) > width
            elif place < width:
                score[child] = total[child] / self.weight(lengths[child])
                pools[number].add(float(score[child]))
            else:
                drop[child] = True
        for number, children in running.items():
            if children:
                request = step.requests[int(growth.request[children[0]])]
                if self.is_over(request, pools[number], float(total[children[:width]].max()), lengths[children[0]]):
                    drop[children] = True

    def weight(self, length: int) -> float:
        """Say what a sum over so many tokens is divided by."""
        base = length if self.params.length_form == "power" else (5 + length) / 6
        return float(base**self.params.length_penalty)

    def is_over(self, request: PreparedRequest, pool: Pool, best: float, length: int) -> bool:
        """Tell whether a search need not go on.

        Args:
            request: whose search it is.
            pool: what has ended.
            best: the largest sum of log-probabilities among the beams that would go on.
            length: their tokens.
        """
        early, longest = self.params.early_stopping, request.limits.max_new_tokens
        reached = longest if early == "never" and self.params.length_penalty > 0 else length
        return pool.is_enough(best / self.weight(reached), early)


def refuse_more_than(width: int, request: PreparedRequest) -> None:
    """Raise an `InputError` if a request wants more texts than there are beams."""
    if request.n > width:
        raise InputError("n", request.n, f"at most the width of the beam, {width}")


def candidates(request: PreparedRequest, width: int) -> int:
    """Count the candidates that leave `width` of them if every beam ends in every way that it can."""
    return max(2, 1 + len(request.end_ids)) * width


def lengths_after(step: Step, growth: Growth) -> list[int]:
    """Count each child's new tokens, itself included."""
    lengths: list[int] = (step.length[growth.row.to(step.length.device)] + 1).tolist()
    return lengths
