"""JSON texts: how whitespace may stand in them, and what they come to when they are parsed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unspool_constrained.constraint import Constraint, ConstraintParams

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest


class JsonParams(ConstraintParams):
    """What constraints to JSON have in common."""

    whitespace: Literal["compact", "flexible"] = Field(
        "compact", description="Whitespace between the parts of the text: none, or as the model likes."
    )


class JsonConstraint(Constraint):
    """A constraint whose texts are JSON."""

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Give the value that the best text is, when it is complete, and say which of them are."""
        said = dict(super().report(request, own, hypotheses))
        if said["complete"][0]:
            # JSON allows what Python does not hold: numbers beyond a float, a million brackets.
            with contextlib.suppress(ValueError, RecursionError):
                said["parsed"] = json.loads(hypotheses[0].text, parse_float=_finite)
        return said


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond a float")
    return value
