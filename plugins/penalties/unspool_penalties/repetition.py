"""Repetition penalty: make every token that has occurred less likely.

Positive logits of tokens on the path are divided by the penalty, negative ones multiplied, once each however often the
token occurs. The prompt counts, as in transformers, unless told otherwise. It depends on where the zero of the logits
lies, which is arbitrary: presence and frequency penalties do not.

    t on the path:   logits[t] <- logits[t] / penalty  if logits[t] >= 0,  else logits[t] * penalty
    (Keskar et al. 2019)

Costs a scatter of the path and three operations over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool_penalties.history import change_present

if TYPE_CHECKING:
    from unspool.step import Step


class RepetitionPenalty(Plugin):
    """Scale down the logits of tokens that occurred."""

    row_local = True

    class Params(Parameters):
        """The penalty and what it counts."""

        main: ClassVar[str | None] = "penalty"
        penalty: float = per_request(1.1, ge=0.01, le=100, description="1 changes nothing; below 1 rewards repetition.")
        include_prompt: bool = Field(True, description="Tokens of the prompt count as having occurred.")

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Scale what stands on each row's path."""
        penalty = step.values(self, "penalty").to(logits).unsqueeze(-1)

        def scaled(seen: Tensor) -> Tensor:
            return (seen * penalty).where(seen < 0, seen / penalty)

        change_present(step, logits, self.params.include_prompt, scaled)
