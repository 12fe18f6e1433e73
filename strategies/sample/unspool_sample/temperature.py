"""Temperature: flatten or sharpen the distribution.

Dividing all logits by T raises probabilities to the power 1/T. Below 1 the likely tokens gain, above 1 the unlikely
ones do. T = 1 changes nothing; the limit T -> 0 is greedy decoding, which has a strategy of its own.

    logits[t] <- logits[t] / T                       (Ackley, Hinton and Sejnowski 1985)

Costs one division over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from unspool.plugin import Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step


class Temperature(Plugin):
    """Divide logits by a temperature."""

    row_local = True

    class Params(Parameters):
        """The temperature."""

        # The bounds keep logits finite in float32, and -inf / T away from -inf / inf.
        temperature: float = per_request(1.0, ge=1e-3, le=1e3, description="Divides the logits; 1 changes nothing.")

        @field_validator("temperature", mode="before")
        @classmethod
        def _zero_is_greedy(cls, value: Any) -> Any:
            if value == 0:
                raise PydanticCustomError(
                    "zero_temperature", "temperature 0 is greedy decoding: use `strategy: greedy`"
                )
            return value

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Divide each row by its temperature."""
        logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))
