"""Draft model: let a small model guess, and the large one judge all its guesses in one pass.

Most tokens are easy, and a small model of the same tokenizer finds them. It runs a few tokens ahead, with the
pipeline's own transforms and noise, and the target runs all of them at once; the strategy then chooses as ever, and
goes on for as long as its choices happen to be drafts.

    draft[i + 1]  =  what the pipeline would choose after draft[..i], were the small model's logits the target's

Leviathan et al. 2023 and Chen et al. 2023, without their rejection: as the noise is the same, what the target would
have drawn is drawn. Costs a pass of the small model for each draft of a chain, with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from unspool.plugin import Companion
from unspool_speculative.companion_drafts import CompanionDrafts


class DraftModel(CompanionDrafts):
    """Draft what a small model would say."""

    class Params(CompanionDrafts.Params):
        """Which model, and how far it goes."""

        main: ClassVar[str | None] = "model"
        model: str = Field(
            min_length=1,
            description="A folder, a hub name or a GGUF file; its tokenizer must be the target's.",
            examples=["draft"],
        )

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the model."""
        return {self.name: Companion(model=self.params.model)}
