"""Texts of a context-free grammar, in Lark's notation or in that of llama.cpp (GBNF) and its kin (EBNF).

A Lark grammar begins with `start`, a GBNF grammar with `root`; which of the two it is, is seen. Any grammar that is not
ambiguous beyond measure is parsed as the text grows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from unspool.plugin import per_request
from unspool_constrained.constraint import Constraint, ConstraintParams
from unspool_constrained.gbnf_as_lark import language_of_grammar
from unspool_constrained.languages import Lark, Pattern

LONGEST = 500_000
"""Characters of a grammar."""


class ContextFree(Constraint):
    """Hold the text to a grammar."""

    said_by = "grammar"

    class Params(ConstraintParams):
        """Which grammar."""

        main: ClassVar[str | None] = "grammar"
        grammar: str = per_request(
            min_length=1,
            max_length=LONGEST,
            description="The grammar, as Lark (`start: ...`) or GBNF (`root ::= ...`).",
            examples=['start: "[" start "]" | "a"', 'root ::= ("a" | "[" root)', r"start: /[a1]/ start | /\]/"],
        )

    @classmethod
    def language(cls, params: Any) -> Pattern | Lark:
        """Give what the grammar means."""
        return language_of_grammar(params.grammar)
