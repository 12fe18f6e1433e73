"""Texts that a regular expression matches, from their beginning to their end.

The expression is that of Rust's `regex` crate and near to Python's: classes, alternatives, repetitions, flags like
`(?i)`. It has neither look-around nor references back. It is matched by derivatives, so no expression is slow to match.
"""

from __future__ import annotations

from typing import Any, ClassVar

from unspool.plugin import per_request
from unspool_constrained.constraint import Constraint, ConstraintParams
from unspool_constrained.languages import Pattern


class Regex(Constraint):
    """Hold the text to a regular expression."""

    said_by = "pattern"

    class Params(ConstraintParams):
        """Which expression."""

        main: ClassVar[str | None] = "pattern"
        pattern: str = per_request(
            min_length=1,
            max_length=10_000,
            description="What the whole text must match.",
            examples=["[a1]+", r"a(\]|\[1)?", r"(\[a\]){2}", r"a*\]*", "[^a]{1,3}"],
        )

    @classmethod
    def language(cls, params: Any) -> Pattern:
        """Give the texts that the expression matches."""
        return Pattern(params.pattern)
