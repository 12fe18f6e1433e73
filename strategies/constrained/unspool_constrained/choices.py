"""One of several strings and nothing else: labels, answers, names of tools."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from unspool.plugin import per_request
from unspool_constrained.constraint import Constraint, ConstraintParams
from unspool_constrained.languages import Strings


class Choices(Constraint):
    """Hold the text to one of several strings."""

    said_by = "choices"

    class Params(ConstraintParams):
        """Which strings."""

        main: ClassVar[str | None] = "choices"
        choices: tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...] = per_request(
            min_length=1,
            max_length=10_000,
            description="The strings.",
            examples=[["a", "["], ["[a", "[a]"], ["a", "[]a", "[]1"]],
        )

    @classmethod
    def language(cls, params: Any) -> Strings:
        """Give the strings."""
        return Strings(tuple(dict.fromkeys(params.choices)))
