"""Any JSON: a text that parses, whatever it says."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from unspool_constrained.json_text import JsonConstraint, JsonParams
from unspool_constrained.languages import Schema


class AnyJson(JsonConstraint):
    """Hold the text to JSON."""

    said_by = "value"

    class Params(JsonParams):
        """What kind of value."""

        main: ClassVar[str | None] = "value"
        value: Literal["any", "object", "array"] = Field("any", description="What the text is as a whole.")

    @classmethod
    def language(cls, params: Any) -> Schema:
        """Give all JSON of that kind."""
        schema = {} if params.value == "any" else {"type": params.value}
        return Schema(json.dumps(schema), params.whitespace == "compact")
