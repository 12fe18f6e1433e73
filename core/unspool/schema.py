"""A JSON Schema of the config file with every installed plugin in it, so that editors complete and check it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from unspool.config import PLACEHOLDER, Config
from unspool.registry import Entry, Registry


def config_schema(registry: Registry) -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of a config file. Broken plugins are left out."""
    schema: dict[str, Any] = _referring(Config.model_json_schema(by_alias=True))
    usable = [entry for entry in registry if entry.broken is None]
    definitions = schema["$defs"]
    definitions |= {f"{entry.name}.params": _inlined(entry.plugin.Params) for entry in usable}
    definitions["Strategy"] = _choice([e for e in usable if e.is_strategy], off=False)
    definitions["Plugin"] = _choice([e for e in usable if not e.is_strategy], off=True)
    # A model may be named alone, and so may a single stop.
    schema["properties"]["model"] = {"anyOf": [schema["properties"]["model"], {"type": "string"}]}
    limits = definitions["LimitSettings"]["properties"]
    for name, kind in (("stop", "string"), ("stop_token_ids", "integer"), ("end_ids", "integer")):
        limits[name]["anyOf"].append({"type": kind})
    definitions["EngineSettings"]["properties"]["memory"]["anyOf"].append({"type": "integer"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Unspool config"}


def _choice(entries: Iterable[Entry], *, off: bool) -> dict[str, Any]:
    """Describe every way of writing one of `entries`."""
    forms: list[dict[str, Any]] = []
    names: list[str] = []
    for entry in entries:
        names.append(entry.name)
        params: type[BaseModel] = entry.plugin.Params
        values: list[dict[str, Any]] = [{"$ref": f"#/$defs/{entry.name}.params"}, {"type": "null"}]
        main = entry.plugin.Params.main_field()
        if main is not None:
            values.append(_inlined(params)["properties"][main])
        if off:
            values.append({"const": False})
        description = (entry.plugin.__doc__ or "").strip().partition("\n")[0]
        forms.append(
            {
                "type": "object",
                "properties": {entry.name: {"anyOf": values}},
                "required": [entry.name],
                "additionalProperties": False,
                "description": description,
            }
        )
    return {"anyOf": [{"enum": names}, {"type": "string", "pattern": "^[A-Za-z_]\\w*:"}, *forms]}


def _referring(part: Any) -> Any:
    """Replace placeholders with references to the definitions of their names."""
    if isinstance(part, dict):
        if PLACEHOLDER in part:
            return {"$ref": f"#/$defs/{part[PLACEHOLDER]}"}
        return {key: _referring(value) for key, value in part.items()}
    return [_referring(item) for item in part] if isinstance(part, list) else part


def _inlined(params: type[BaseModel]) -> dict[str, Any]:
    """Give the schema of `params` without references of its own, since it goes into another schema."""
    schema = params.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, dict):
            if (reference := part.get("$ref", "")).startswith("#/$defs/"):
                return resolve(definitions[reference.removeprefix("#/$defs/")])
            return {key: resolve(value) for key, value in part.items() if key != "per_request"}
        return [resolve(item) for item in part] if isinstance(part, list) else part

    resolved: dict[str, Any] = resolve(schema)
    return resolved
