"""Hugging Face logits processors and stopping criteria as plugins.

Each row is shown its own path. Rows are grouped by length, so a processor gets a batch without padding, which is what
it would see under `generate`, only that the batch changes from call to call. A processor must therefore be a function
of `input_ids` and `scores` alone, row by row: known ones of transformers are, any other must be declared `pure`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl

if TYPE_CHECKING:
    from unspool.step import Step

STATELESS = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)
"""Classes of transformers whose result depends on `input_ids` and `scores` alone, row by row."""

REASON = "stopping_criteria"
"""The finish reason of a path that a wrapped criterion ends."""


def wrap_processor(processor: Callable[..., Tensor], pure: bool = False) -> Plugin:
    """Make a plugin of a logits processor (`(input_ids, scores) -> scores`).

    The same object wrapped twice gives equal plugins, whose requests share a group; different objects never do.

    Args:
        processor: the processor. It is called in no particular order, on rows in no particular batch.
        pure: declare that each row of its result depends on that row of `input_ids` and `scores` alone.

    Raises:
        InputError: it may keep state between calls and is not declared pure, or it is a list of processors.
    """
    if isinstance(processor, list):
        raise InputError("processor", processor, "one processor; wrap each of a list by itself")
    if not pure and not _is_stateless(processor):
        raise InputError(
            "processor",
            processor,
            "it may keep state between calls, and drafts, forks and batching call it in any order; if each row of its "
            "result depends on that row of input_ids and scores alone, say pure=True",
        )
    return WrappedProcessor(processor)


def wrap_criteria(criteria: Callable[..., Any]) -> Plugin:
    """Make a plugin of a stopping criterion (`(input_ids, scores) -> [batch] bool`). It gets None for `scores`.

    What it ends has the finish reason `stopping_criteria`.

    Raises:
        InputError: it reads scores or the clock, or it is a list of criteria.
    """
    if isinstance(criteria, list):
        raise InputError("criteria", criteria, "one criterion; wrap each of a list by itself")
    name = type(criteria).__name__
    if name == "MaxTimeCriteria":
        raise InputError("criteria", criteria, "a criterion that reads the path; for a time limit set `deadline`")
    if name == "ConfidenceCriteria":
        raise InputError("criteria", criteria, "a criterion that reads the path alone: no scores are kept for it")
    return WrappedCriteria(criteria)


class Wrapper(Plugin):
    """A plugin around one object of transformers. Its parameters say which, so no other object shares its group."""

    row_local = True

    class Params(Parameters):
        """The class of what is wrapped, and a number that no other object of this process has."""

        wraps: str
        identity: int

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        kind = type(wrapped)
        identity = _identity(wrapped)
        super().__init__(self.Params(wraps=f"{kind.__module__}.{kind.__qualname__}", identity=identity))
        self.wrapped = wrapped
        self.name = f"{kind.__name__}-{identity}"


class WrappedProcessor(Wrapper):
    """Apply a logits processor to each row and its own path."""

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Call the processor once for each length of path."""
        for rows, ids in _by_length(*step.paths()):
            before = logits[rows]
            after = self.wrapped(ids, before)
            if after.shape != before.shape:
                raise ValueError(f"the processor gave shape {list(after.shape)} for {list(before.shape)}")
            logits[rows] = after.to(logits.dtype)


class WrappedCriteria(Wrapper):
    """Finish each child whose path a stopping criterion ends."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Call the criterion once for each length of path."""
        for children, ids in _by_length(*growth.paths()):
            done = torch.as_tensor(self.wrapped(ids, None)).expand(len(children)).tolist()
            for child, ends in zip(children.tolist(), done, strict=True):
                if ends and growth.finish[child] is None:
                    growth.finish[child] = REASON


def _is_stateless(processor: object) -> bool:
    # The exact class: a subclass may add state.
    kind = type(processor)
    known = kind.__module__.startswith("transformers.") and kind.__name__ in STATELESS
    # A tensor here holds a number for each row of one particular batch.
    return known and not isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)


def _by_length(ids: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split padded paths into batches of one length: indices `[n]`, ids `[n, length]`."""
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().squeeze(-1)
        yield rows, ids[rows, :length]


_numbers = itertools.count(1)
_identities: dict[int, int] = {}


def _identity(wrapped: object) -> int:
    """Give an object a number: the same again for the same object, never that of another, be it dead."""
    key = id(wrapped)
    if key not in _identities:
        number = next(_numbers)
        try:
            weakref.finalize(wrapped, _identities.pop, key)
        except TypeError:  # it cannot be watched, so its id cannot be trusted later
            return number
        _identities[key] = number
    return _identities[key]
