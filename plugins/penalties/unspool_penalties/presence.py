"""Presence penalty: subtract a constant from every token that has occurred.

A token pays once, however often it occurs, so new topics gain. Only generated tokens count, as in OpenAI's interface,
unless told otherwise. A negative penalty rewards repetition.

    t on the path:   logits[t] <- logits[t] - penalty                       (OpenAI API reference)

Costs a scatter of the path and two operations over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool_penalties.history import change_present

if TYPE_CHECKING:
    from unspool.step import Step


class PresencePenalty(Plugin):
    """Lower the logits of tokens that occurred."""

    row_local = True

    class Params(Parameters):
        """The penalty and what it counts."""

        main: ClassVar[str | None] = "penalty"
        penalty: float = per_request(0.5, ge=-100, le=100, description="What a token that occurred pays; 0 is nothing.")
        include_prompt: bool = Field(False, description="Tokens of the prompt count as having occurred.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Lower what stands on each row's path."""
        penalty = step.values(self, "penalty").to(logits).unsqueeze(-1)
        change_present(step, logits, self.params.include_prompt, lambda seen: seen - penalty)
