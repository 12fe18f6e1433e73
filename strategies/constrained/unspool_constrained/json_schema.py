"""JSON that a schema takes.

A JSON schema says which values are wanted; the text is one of them. Properties come in the schema's order. A keyword
that cannot be enforced (`not`, `if`, `uniqueItems`, `contains`, ...) is refused, as is a `oneOf` whose alternatives
overlap: a schema holds as it is written or not at all. Keywords that JSON Schema does not know are notes.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, PydanticUserError, field_validator

from unspool.plugin import per_request
from unspool_constrained.json_text import JsonConstraint, JsonParams
from unspool_constrained.languages import Schema
from unspool_constrained.schema_limits import LONGEST, check_schema

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "schema"')  # BaseModel.schema is a method of pydantic 1

    class SchemaParams(JsonParams):
        """Which schema."""

        main: ClassVar[str | None] = "schema"
        schema: dict[str, Any] = per_request(  # type: ignore[assignment]
            description="The schema itself, the path of a `.json` file that holds it, or `module:Model`.",
            examples=[
                {"type": "integer"},
                {"enum": [1, 11, [], [1]]},
                {"type": "array", "items": {"type": "array"}, "maxItems": 2},
                {"type": "array", "items": {"type": "array", "items": {"const": 1}}},
            ],
        )

        @field_validator("schema", mode="before")
        @classmethod
        def _read(cls, given: Any) -> Any:
            if isinstance(given, type):
                return _schema_of(given)
            if not isinstance(given, str):
                return given
            module, colon, name = given.partition(":")
            return _of_model(module, name) if colon and not given.endswith(".json") else _of_file(given)


class JsonSchema(JsonConstraint):
    """Hold the text to a JSON schema."""

    said_by = "schema"

    class Params(SchemaParams):
        """Which schema."""

    @classmethod
    def language(cls, params: Any) -> Schema:
        """Give the JSON that the schema takes."""
        text = json.dumps(params.schema)
        check_schema(params.schema, text)
        return Schema(text, params.whitespace == "compact")


def _of_model(module: str, name: str) -> dict[str, Any]:
    """Give the schema of a pydantic model in a module that the program has imported.

    Nothing is ever imported for it: a request of a server may name any module, and importing one runs its code.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ValueError(f"{name!r} must be a pydantic model in a module that is imported already, {module!r}")
    return _schema_of(found)


def _schema_of(model: type) -> dict[str, Any]:
    if not issubclass(model, BaseModel) or model is BaseModel:
        raise ValueError("a class must be a pydantic model")
    try:
        return model.model_json_schema()
    except PydanticUserError as error:
        raise ValueError(f"a pydantic model that has a JSON schema: {error.message}") from error


def _of_file(path: str) -> Any:
    """Read a schema. Who serves strangers takes schemas inline alone: a path is read with the server's rights."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        raise ValueError("a schema, `module:Model`, or the path of a `.json` file that is there")
    if file.stat().st_size > 4 * LONGEST:
        raise ValueError(f"a file of at most {LONGEST:,} characters")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"a file of JSON: {type(error).__name__}") from error
