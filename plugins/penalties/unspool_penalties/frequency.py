"""Frequency penalty: subtract from every token in proportion to how often it has occurred.

The more often a token was used the more it pays, so that verbatim loops end. Only generated tokens count, as in
OpenAI's interface, unless told otherwise. A negative penalty rewards repetition.

    logits[t] <- logits[t] - penalty * (occurrences of t on the path)         (OpenAI API reference)

Costs a scatter of the path and two operations over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool_penalties.history import counts

if TYPE_CHECKING:
    from unspool.step import Step


class FrequencyPenalty(Plugin):
    """Lower the logits of tokens by how often they occurred."""

    row_local = True

    class Params(Parameters):
        """The penalty and what it counts."""

        main: ClassVar[str | None] = "penalty"
        penalty: float = per_request(0.5, ge=-100, le=100, description="What a token pays for each occurrence.")
        include_prompt: bool = Field(False, description="Tokens of the prompt are counted.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Lower what stands on each row's path."""
        penalty = step.values(self, "penalty").to(logits).unsqueeze(-1)
        logits.sub_(counts(step, logits, self.params.include_prompt) * penalty)
