"""Biases: raise or lower chosen tokens, or tokens that would complete chosen sequences; forbid bad words.

A logit bias is added to a token's logit at every position. A sequence bias is added to the last token of a sequence
where the path, the prompt included, ends with the tokens before it. A bad word is a sequence whose last token is
forbidden there.

    logits[t] <- logits[t] + sum of b(s) over all s = (s_1, ..., s_m, t) whose s_1 ... s_m end the path

Costs one addition a biased token; for sequences a comparison of rows x sequences x length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from unspool.plugin import Parameters, Plugin, TokenId, hookimpl
from unspool_penalties.token_ids import index

if TYPE_CHECKING:
    from unspool.step import Step

Bias = Annotated[float, Field(ge=-1e4, le=1e4)]
TokenSequence = Annotated[tuple[TokenId, ...], Field(min_length=1)]


class LogitBias(Plugin):
    """Add a constant to the logits of chosen tokens."""

    row_local = True

    class Params(Parameters):
        """The biases."""

        biases: dict[TokenId, Bias] = Field(
            min_length=1, description="Token id -> what is added. To forbid a token, use `suppress_tokens`."
        )

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Add the biases to every row."""
        biases: Mapping[int, float] = self.params.biases
        logits[:, index(tuple(biases), logits, self.name)] += logits.new_tensor(tuple(biases.values()))


class SequenceBias(Plugin):
    """Add a constant to the logit of the token that would complete a sequence."""

    row_local = True

    class Params(Parameters):
        """The sequences and their biases."""

        sequences: tuple[tuple[TokenSequence, Bias], ...] = Field(
            min_length=1,
            description="Pairs of token ids and what is added to the last one; of equal ids the last counts.",
        )

    def __init__(self, params: BaseModel) -> None:
        super().__init__(params)
        biases = dict(self.params.sequences)
        self.endings = [Endings(group, [biases[s] for s in group]) for group in _by_length(tuple(biases))]

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Add the biases of the sequences that each row's path has begun."""
        for endings in self.endings:
            endings.apply(step, logits, self.name)


class BadWords(Plugin):
    """Forbid the token that would complete one of the sequences."""

    row_local = True
    constraint = True

    class Params(Parameters):
        """The sequences."""

        sequences: tuple[TokenSequence, ...] = Field(min_length=1, description="Lists of token ids that may not occur.")

    def __init__(self, params: BaseModel) -> None:
        super().__init__(params)
        groups = _by_length(dict.fromkeys(self.params.sequences))
        self.endings = [Endings(group, [-torch.inf] * len(group)) for group in groups]

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what would complete a sequence that each row's path has begun."""
        for endings in self.endings:
            endings.apply(step, logits, self.name)


class Endings:
    """Sequences of one length, and what is added to their last tokens.

    Args:
        sequences: token ids, all equally many.
        biases: one for each sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], biases: Sequence[float]) -> None:
        self.beginnings = torch.tensor([s[:-1] for s in sequences], dtype=torch.int64)  # [sequences, length - 1]
        self.last = [s[-1] for s in sequences]
        self.biases = torch.tensor(biases, dtype=torch.float64)

    def apply(self, step: Step, logits: Tensor, plugin: str) -> None:
        """Add the biases to `logits` `[rows, vocab]` in place, in rows whose path ends with a beginning."""
        last, biases = index(self.last, logits, plugin), self.biases.to(logits)
        begun = self._begun(step, logits)
        logits.index_add_(-1, last, biases.where(begun, 0.0))

    def _begun(self, step: Step, logits: Tensor) -> Tensor:
        """Tell which sequences each row has begun: `[rows, sequences]` bool."""
        sequences, length = self.beginnings.shape
        if not length:
            return torch.ones(len(logits), sequences, dtype=torch.bool, device=logits.device)
        ids, lengths = step.paths()
        at = lengths.unsqueeze(-1) - length + torch.arange(length, device=ids.device)
        tail = ids.gather(-1, at.clamp(min=0)).masked_fill(at < 0, -1)  # -1: no token, so no beginning reaches there
        return (tail.unsqueeze(1) == self.beginnings.to(ids.device)).all(dim=-1)


def _by_length(sequences: Mapping[tuple[int, ...], None] | Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    groups: dict[int, list[tuple[int, ...]]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    return list(groups.values())
