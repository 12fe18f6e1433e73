"""Contrastive decoding: prefer what an expert finds likelier than an amateur does.

A small model, or the first layers of the same one, makes the mistakes of the large one more often: it repeats itself,
drifts and guesses. Subtracting what the amateur says from what the expert says takes these away, among the tokens that
the expert itself finds plausible.

    V       =  { t : p[t] >= alpha max p },   out[t] = -inf outside
    li         out[t]  =  log p[t] - beta log q[t]                                                 (Li et al. 2022)
    obrien     out[t]  =  (1 + beta) log p[t] - beta log q[t]                                (O'Brien & Lewis 2023)

p is the softmax of the logits as plugins before left them, q that of the amateur's, divided by `temperature`. The paper
of Li et al. is `li` with beta = 1. Costs one pass of the amateur for every row, run for all requests at once,
with cache slots of its own; then two log-softmaxes over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from unspool.distributions import log_ratio
from unspool.plugin import Companion, Parameters, Plugin, hookimpl, per_request

if TYPE_CHECKING:
    from unspool.step import Step

AMATEUR = "amateur"


class ContrastiveDecoding(Plugin):
    """Subtract an amateur's log-probabilities from the expert's."""

    row_local = True

    class Params(Parameters):
        """Who the amateur is, and how much it counts."""

        main: ClassVar[str | None] = "amateur"
        amateur: str | None = Field(
            None,
            min_length=1,
            description="The amateur's name or path; it has the target's vocabulary. None: the target.",
        )
        layers: int | None = Field(
            None, ge=1, description="Run only the amateur's first layers, then its norm and head.", examples=[1, 2]
        )
        form: Literal["li", "obrien"] = Field(
            "li", description="`li`: log p - beta log q; `obrien`: (1 + beta) log p - beta log q."
        )
        beta: float = per_request(1.0, ge=0, le=10, description="Weight of the amateur.")
        alpha: float = per_request(
            0.1, gt=0, le=1, description="Least probability of a token, as a fraction of the best one's; 1 is greedy."
        )
        temperature: float = per_request(
            1.0, ge=0.001, le=1000, description="Of the amateur: below 1 it is surer of itself, above 1 less so."
        )

        @model_validator(mode="after")
        def _is_another(self) -> Self:
            if self.amateur is None and self.layers is None:
                raise ValueError(
                    "name an amateur: `amateur`, a smaller model, or `layers`, the first of the target's own"
                )
            return self

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the amateur beside every row."""
        return {AMATEUR: Companion(model=self.params.amateur, layers=self.params.layers, every_row=True)}

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Contrast every row with the amateur's."""
        alpha, beta, temperature = (
            step.values(self, field).to(logits).unsqueeze(-1) for field in ("alpha", "beta", "temperature")
        )
        amateur = step.companion(AMATEUR).to(logits) / temperature
        log_ratio(logits, amateur, alpha, gain=1 + beta if self.params.form == "obrien" else None, weight=beta)
