"""Layer skip: let the target's own first layers guess.

No second model and no second copy of weights: the first layers, then the final norm and the output matrix, are the
draft model. It is good where a model was trained to leave early (LayerSkip, Elhoushi et al. 2024), and elsewhere as far
as its upper layers change little.

    draft[i + 1]  =  what the pipeline would choose after draft[..i], were head(state of layer `layers`) the logits

Costs `layers` of the model's layers for each draft of a chain, and cache slots of their own for these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from unspool.plugin import Companion
from unspool_speculative.companion_drafts import CompanionDrafts


class LayerSkip(CompanionDrafts):
    """Draft what the first layers would say."""

    class Params(CompanionDrafts.Params):
        """How many layers, and how far they go."""

        main: ClassVar[str | None] = "layers"
        layers: int = Field(ge=1, description="Run only the first so many layers.", examples=[1])

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the first layers."""
        return {self.name: Companion(layers=self.params.layers)}
