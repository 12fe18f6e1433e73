"""Classifier-free guidance: push away from what the model says after another prompt.

The same text is continued after the prompt and after a negative one: a prompt without the instruction, or one that asks
for what is not wanted. What the prompt changes is then exaggerated. The negative prompt of a request may be left out:
it is the prompt's last token alone, so that guidance holds the text to its prompt.

    out  =  log n + scale (log p - log n)  =  log p + (scale - 1) (log p - log n)              (Sanchez et al. 2023)

p is what the model says after the prompt and n after the negative one. The difference is added to the logits as plugins
before left them, so these keep their effect and what is forbidden stays so; scale = 1 changes nothing. Costs a second
row beside every row, in the same pass, with cache slots of its own; then two log-softmaxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.plugin import Companion, Parameters, Plugin, TokenIds, hookimpl, per_request
from unspool.prompt import encode_like

if TYPE_CHECKING:
    from unspool.request import PreparedRequest
    from unspool.step import Step

NEGATIVE = "negative"


class Message(Parameters):
    """One message of a chat."""

    role: str = Field(description="`system`, `user`, `assistant`, or what the chat template knows.")
    content: str = Field(description="Its text.")


class Guidance(Plugin):
    """Add to the logits what the prompt changes, once more."""

    row_local = True

    class Params(Parameters):
        """How far, and away from what."""

        main: ClassVar[str | None] = "scale"
        scale: float = per_request(
            1.5,
            ge=0,
            le=100,
            description="1 changes nothing, above 1 follows the prompt more; 0 follows the negative prompt alone.",
        )
        negative_prompt: (
            Annotated[str, Field(min_length=1)] | TokenIds | Annotated[tuple[Message, ...], Field(min_length=1)] | None
        ) = per_request(
            None, description="Text, messages or token ids, encoded as the prompt is; None: the prompt's last token."
        )

    def companions(self) -> Mapping[str, Companion]:
        """Ask for the negative prompt beside every row."""
        return {NEGATIVE: Companion(prompt=self._negative_prompt, every_row=True)}

    def _negative_prompt(self, request: PreparedRequest) -> Sequence[int]:
        params = request.parameters[self.name]
        assert isinstance(params, Guidance.Params)
        given: Any = params.negative_prompt
        if given is None:
            return request.prompt_ids[-1:]
        if isinstance(given, tuple):
            given = [part.model_dump() if isinstance(part, Message) else part for part in given]
        try:
            return encode_like(request, given)
        except InputError as error:
            raise InputError(f"{self.name}.negative_prompt", error.value, error.allowed) from error

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Push every row away from its twin."""
        said = step.raw.to(logits).log_softmax(dim=-1)
        negative = step.companion(NEGATIVE).to(logits).log_softmax(dim=-1)
        push = (step.values(self, "scale").to(logits).unsqueeze(-1) - 1) * (said - negative)
        logits.add_(push.masked_fill_(logits == -torch.inf, 0.0))
