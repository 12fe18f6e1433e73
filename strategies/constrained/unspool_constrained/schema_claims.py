"""What `json_schema` claims to allow: a grammar of the values that a schema takes, written down keyword by keyword.

What most schemas consist of is known: constants, types, lengths, items, properties, alternatives and definitions. A
keyword that is not, or two that would have to be joined, leave the claim open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from unspool_constrained.claims import allowed, text_of
from unspool_constrained.gbnf import Choice, Class, Literal, Node, Parts, Reader, Reference, Repeat
from unspool_constrained.grammar_claims import Rules, standing

_NOTES = {"title", "description", "default", "examples", "$comment", "$schema", "$defs"}
_ALONE = {"const", "enum", "anyOf", "$ref"}
_OF_TYPES = {"type", "minLength", "maxLength", "items", "minItems", "maxItems"}
_OF_TYPES |= {"properties", "required", "additionalProperties"}

_SCALARS = Reader(r"""
root ::= null boolean integer number character
null ::= "null"
boolean ::= "true" | "false"
integer ::= "-"? ("0" | [1-9] [0-9]*)
number ::= integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
character ::= [^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
""").rules()


class JsonSchema:
    """What derives from the grammar of the schema."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Derive the whole, or a longer text that begins so."""
        rules, text = rules_of_schema(json.dumps(params.schema), params.whitespace), text_of(request, tokens, ended)
        return text is not None and allowed(params, standing(rules, text).takes(ended), ended)

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """End where no value goes on."""
        rules, text = rules_of_schema(json.dumps(params.schema), params.whitespace), text_of(request, tokens, False)
        return None if text is None else standing(rules, text).finishes()


@lru_cache(maxsize=64)
def rules_of_schema(text: str, whitespace: str = "compact") -> Rules:
    """Give the grammar of a schema.

    Raises:
        NotImplementedError: the schema says more than is known here.
    """
    return _Writer(json.loads(text), compact=whitespace == "compact").rules()


class _Writer:
    """Writes the values of a schema as a grammar.

    Args:
        schema: the whole, for its references.
        compact: no whitespace between the parts of a text.
    """

    def __init__(self, schema: Any, *, compact: bool) -> None:
        self._whole, self._rules = schema, dict(_SCALARS)
        self._space: Node = Literal("") if compact else Repeat(Class(r"[ \t\n\r]"), 0, None)

    def rules(self) -> Rules:
        """Give the grammar."""
        anything = {"type": ["null", "boolean", "number", "string", "array", "object"]}
        self._rules["anything"] = self._value(anything)
        self._rules["root"] = self._value(self._whole)
        return tuple(self._rules.items())

    def _value(self, schema: Any) -> Node:
        if schema is True:
            return Reference("anything")
        if not isinstance(schema, dict):
            raise NotImplementedError("a schema that takes nothing")
        keywords = schema.keys() - _NOTES
        if not keywords:
            return Reference("anything")
        if "type" in keywords and keywords <= _OF_TYPES:
            types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            return Choice(tuple(self._of_type(name, schema) for name in types))
        if len(keywords) > 1 or not keywords <= _ALONE:
            raise NotImplementedError(f"a schema with {', '.join(sorted(keywords))}")
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        if "anyOf" in schema:
            return Choice(tuple(map(self._value, schema["anyOf"])))
        return Choice(tuple(map(self._constant, schema.get("enum", [schema.get("const")]))))

    def _referred(self, reference: str) -> Node:
        name = reference.removeprefix("#/$defs/")
        if reference != "#" and name not in self._whole.get("$defs", {}):
            raise NotImplementedError(f"a reference to {reference}")
        if reference != "#" and reference not in self._rules:
            self._rules[reference] = Reference(reference)  # it may refer to itself
            self._rules[reference] = self._value(self._whole["$defs"][name])
        return Reference("root" if reference == "#" else reference)

    def _of_type(self, name: str, schema: dict[str, Any]) -> Node:
        match name:
            case "string":
                characters = Repeat(Reference("character"), schema.get("minLength", 0), schema.get("maxLength"))
                return Parts((Literal('"'), characters, Literal('"')))
            case "array":
                item = self._value(schema.get("items", True))
                return self._spaced("[", self._list(item, schema.get("minItems", 0), schema.get("maxItems")), "]")
            case "object":
                return self._object(schema)
        return Reference(name)

    def _list(self, item: Node, least: int, most: int | None) -> Node:
        """Write `least` to `most` items, with commas between them."""
        if most == 0:
            return Literal("")
        item = self._rule(item)
        other = Parts((self._space, self._spaced(",", item)))
        items = Parts((item, Repeat(other, max(least - 1, 0), None if most is None else most - 1)))
        return items if least else Choice((Literal(""), items))

    def _object(self, schema: dict[str, Any]) -> Node:
        """Write properties in the order of the schema, those that are not required or none."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not properties and not required and schema.get("additionalProperties", True) is True:
            name = Parts((Literal('"'), Repeat(Reference("character"), 0, None), Literal('"')))
            return self._spaced("{", self._list(self._spaced(name, ":", Reference("anything")), 0, None), "}")
        if schema.get("additionalProperties") is not False or not set(required) <= set(properties):
            raise NotImplementedError("an object with properties that have no schema")
        first: Node = Literal("")
        later: Node = Literal("")
        for name, inner in reversed(properties.items()):
            here = self._rule(self._spaced(self._constant(name), ":", self._value(inner), later))
            after = self._spaced(",", here)
            first = here if name in required else Choice((here, first))
            later = self._rule(after if name in required else Choice((after, later)))
        return self._spaced("{", first, "}")

    def _rule(self, node: Node) -> Node:
        """Name a node that stands in several places, so that it is written once."""
        name = f"rule {len(self._rules)}"
        self._rules[name] = node
        return Reference(name)

    def _constant(self, value: Any) -> Node:
        if isinstance(value, float) or (isinstance(value, str) and not (value.isascii() and value.isprintable())):
            raise NotImplementedError(f"a constant that has several spellings: {value!r}")
        if isinstance(value, list):
            return self._spaced("[", *self._commas(list(map(self._constant, value))), "]")
        if isinstance(value, dict):
            pairs = [self._spaced(self._constant(key), ":", self._constant(each)) for key, each in value.items()]
            return self._spaced("{", *self._commas(pairs), "}")
        return Literal(json.dumps(value))

    def _commas(self, parts: list[Node]) -> list[Node | str]:
        return [each for part in parts for each in (",", part)][1:]

    def _spaced(self, *parts: Node | str) -> Node:
        """Write parts one after the other, with whitespace between them."""
        nodes = [Literal(part) if isinstance(part, str) else part for part in parts]
        return Parts(tuple(node for part in nodes for node in (self._space, part))[1:])
