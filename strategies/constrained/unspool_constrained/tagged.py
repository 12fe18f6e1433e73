"""Free text with calls in it: what stands between two markers is constrained, all else is free.

Tool calls are written so: the model talks, opens a tag, writes arguments, closes it, and talks on. After a begin marker
the text must follow the tag's language up to its end marker, and only then may it end or be free again. Begin markers
may be ordinary text or an added token that shows as text; a special token shows as none, and can be no marker.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from unspool.plugin import Parameters, per_request
from unspool_constrained.constraint import Constraint, ConstraintParams
from unspool_constrained.gbnf_as_lark import language_of_grammar
from unspool_constrained.languages import Lark, Pattern, Schema, Tag, TaggedText
from unspool_constrained.schema_limits import check_schema


class TagParams(Parameters):
    """One kind of tag. Exactly one of `json_schema`, `regex` and `grammar` says what stands in it."""

    begin: str = Field(min_length=1, max_length=200, description="The marker before it.")
    end: str = Field(min_length=1, max_length=200, description="The marker after it.")
    json_schema: dict[str, Any] | None = Field(None, description="A JSON schema; the text is compact.")
    regex: str | None = Field(None, min_length=1, max_length=10_000, description="A regular expression.")
    grammar: str | None = Field(None, min_length=1, max_length=100_000, description="A grammar, in Lark or GBNF.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(inner is not None for inner in (self.json_schema, self.regex, self.grammar)) != 1:
            raise ValueError("exactly one of `json_schema`, `regex` and `grammar` says what stands in a tag")
        return self


class Tagged(Constraint):
    """Constrain what stands between markers."""

    said_by = "tags"

    class Params(ConstraintParams):
        """Which tags."""

        main: ClassVar[str | None] = "tags"
        tags: tuple[TagParams, ...] = per_request(
            min_length=1,
            max_length=128,
            description="The kinds of tags.",
            examples=[
                [{"begin": "[", "end": "]", "regex": "a+"}],
                [{"begin": "a", "end": "a", "json_schema": {"type": "array"}}],
            ],
        )
        required: bool = per_request(False, description="At least one tag must be there.")

    @classmethod
    def language(cls, params: Any) -> TaggedText:
        """Give free text with these tags."""
        return TaggedText(tuple(map(_tag, params.tags)), params.required)


def _tag(tag: TagParams) -> Tag:
    inner: Schema | Pattern | Lark
    if tag.json_schema is not None:
        text = json.dumps(tag.json_schema)
        check_schema(tag.json_schema, text)
        inner = Schema(text, compact=True)
    elif tag.regex is not None:
        inner = Pattern(tag.regex)
    else:
        inner = language_of_grammar(tag.grammar or "")
    return Tag(tag.begin, inner, tag.end)
