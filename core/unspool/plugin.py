"""What a plugin declares: its parameters, what must be computed for it, and how it may be scheduled.

A plugin is a subclass of `Plugin` with `@hookimpl` methods named after the four hooks (see `hooks.py`). One instance
serves many requests, so `self` holds parameters and nothing else; what changes lives along the path (`initial`,
`advance`) or in the request's own object (`open`, `close`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pluggy
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from unspool.pipeline import Pipeline
    from unspool.request import Hypothesis, PreparedRequest, Result

CONTRACT = 1
"""The version of the hook contract that this core speaks."""

hookimpl = pluggy.HookimplMarker("unspool")
"""Marks a method as the implementation of the hook of that name."""


class Parameters(BaseModel):
    """The base of every plugin's `Params`: frozen, and closed to unknown fields.

    `main` names the field that the short form sets: `temperature: 0.7`. A model with one field needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    main: ClassVar[str | None] = None

    @classmethod
    def main_field(cls) -> str | None:
        """Name the field that a bare value stands for, if there is one."""
        fields = list(cls.model_fields)
        return cls.main or (fields[0] if len(fields) == 1 else None)


def per_request(default: Any = ..., **options: Any) -> Any:
    """Declare a pydantic field whose value may differ between requests of one group.

    Read it with `step.values(self, name)`, never from `self.params`: the group shares one instance.
    """
    return Field(default, json_schema_extra={"per_request": True}, **options)


def per_request_fields(params: type[BaseModel]) -> frozenset[str]:
    """Name the fields of `params` that were declared with `per_request`."""
    return frozenset(
        name
        for name, field in params.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("per_request")
    )


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


TokenId = Annotated[int, Field(ge=0, json_schema_extra={"token_id": True})]
"""A parameter that is one token id. (So marked, the test kit keeps it inside a model's vocabulary.)"""

TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1), BeforeValidator(_listed)]
"""A parameter of at least one token id; a bare id stands for a list of one."""


@dataclass(frozen=True)
class Companion:
    """The same token tree run another way: by another model, after another prompt, or by the first layers only.

    Args:
        model: a loaded model's name or path; None is the target itself.
        prompt: token ids that stand before the same new tokens, or a pure function that gives them for a request; None
            is the request's own prompt.
        layers: run only so many layers, then the final norm and the head; None is all of them.
        every_row: run beside every row in the step's pass (guidance), not only when asked (a draft model).
    """

    model: str | None = None
    prompt: tuple[int, ...] | Callable[[PreparedRequest], Sequence[int]] | None = None
    layers: int | None = None
    every_row: bool = False


class Plugin:
    """The base of every plugin. Subclass it, declare, and implement the hooks that you need.

    Args:
        params: a validated instance of the class's own `Params`.
    """

    class Params(Parameters):
        """No parameters."""

    contract: ClassVar[int] = CONTRACT
    """The contract version that the plugin was written for."""
    name: str = ""
    """The name it is registered by; the registry sets it."""
    row_local: bool = False
    """What it says of a row depends on that row, its request and its drafts alone."""
    reads_logprob: bool = False
    """`advance` takes the log-probability of the token in the distribution that `select` saw."""
    reads_score: bool = False
    """It reads `step.score` or `growth.score` though its strategy may not score (a strategy that is not `row_local`
    always gets scores)."""
    score_columns: int = 1
    """As a strategy, how many columns its scores have (`step.score` is zeros of that width at the prompt)."""
    hidden: Sequence[int] = ()
    """Layers whose hidden states are wanted for rows and drafts; 0 is the embedding, -1 after the final norm."""
    path_hidden: Sequence[int] = ()
    """Layers whose hidden states are stored beside keys and values for every ancestor."""
    holds: bool = False
    """As a strategy, its `select` hangs drafts under rows and decides in the next step."""
    constraint: bool = False
    """Its transform forbids tokens and must act before all others."""

    def __init__(self, params: BaseModel) -> None:
        self.params: Any = params

    def companions(self) -> Mapping[str, Companion]:
        """Name the companions that must be at hand."""
        return {}

    def refuse(self, pipeline: Pipeline) -> str | None:
        """Say why this plugin cannot work in `pipeline`, or None."""
        return None

    # State along the path. A plugin has one if its class overrides `initial`.
    def initial(self, request: PreparedRequest) -> Any:
        """Give the path state after the prompt. Pure."""
        return None

    def advance(self, state: Any, token: int, logprob: float = 0.0) -> Any:
        """Give the state one token later, or None if that token cannot be. Pure; never called on or beyond an end."""
        return state

    # State of the request. A plugin has one if its class overrides `open`.
    def open(self, request: PreparedRequest) -> Any:
        """Make the object that `step.own(self)` lists for this request."""
        return None

    def share(self) -> Any:
        """Make what all requests of an engine have in common, once. They find it in `request.shared[self.name]`.

        For drafters alone, who may learn from other requests: nothing else of a text may depend on them.
        """
        return None

    def close(self, own: Any, result: Result) -> None:
        """Hear of the request's end (a suffix drafter learns here)."""

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Say what else there is to know of a result: votes, weights, an estimate. It becomes `Result.reports[name]`.

        Args:
            request: the request that has ended, with at least one hypothesis.
            own: what `open` made for it; None if it makes nothing.
            hypotheses: all of them, best first; the first `request.n` are returned.

        Returns:
            What JSON can carry, by name; empty: nothing.
        """
        return {}

    # Only asked of the strategy.
    def start(self, request: PreparedRequest) -> int:
        """Say how many branches stand on the prompt at first, in streams 0, 1, ..."""
        return request.n if self.row_local else 1

    def widest(self, request: PreparedRequest) -> int:
        """Say how many branches it keeps at most, so that slots for all of them are claimed side by side."""
        return self.start(request)

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Order the finished hypotheses, best first. By score unless overridden; their texts are there."""
        return sorted(hypotheses, key=lambda h: -(h.score if h.score is not None else float("-inf")))
