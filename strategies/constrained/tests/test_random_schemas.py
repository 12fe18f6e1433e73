"""A thousand texts under random schemas, from a network that knows nothing: each that ends is valid."""

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unspool.huggingface.runner import HuggingFaceRunner
from unspool.pipeline import Pipeline
from unspool.runner import ModelRunner
from unspool_constrained.guidance import ENGINE
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.languages import Schema
from unspool_constrained.vocabulary import Vocabulary
from unspool_sample.sample import Sample
from unspool_testing.driver import drive, plugin, request
from unspool_testing.letters import tokenizer_of
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

TOKENS = [
    "<end>",
    *'{}[]:,.-+"\\/eEabcdfnrstuolxyz0123456789',
    '":',
    '",',
    '"}',
    "{}",
    "[]",
    "true",
    "null",
    '{"',
    "false",
]
TOKENIZER = tokenizer_of(TOKENS, ["<end>"])
BYTES = Vocabulary([bytes([byte]) for byte in range(256)], lambda text: list(text.encode()))
LEAVES: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5},
    {"type": "string", "maxLength": 4},
    {"type": "string", "pattern": "^[abc]{1,3}$"},
    {"enum": ["a", 1, None, "xyz"]},
    {"const": {"a": [1, 2]}},
    {"type": ["string", "null"], "minLength": 1, "maxLength": 3},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
]


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.lists(st.sampled_from(["a", "b", "cd", "x"]), unique=True, max_size=3)

    @st.composite
    def made(draw: st.DrawFn) -> Any:
        keys = draw(names)
        required = [key for key in keys if draw(st.booleans())]
        properties = {key: draw(inner) for key in keys}
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return made()


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCHEMAS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=2).map(lambda any_of: {"anyOf": any_of})
    ),
    max_leaves=5,
)


def objects_of_positive_numbers() -> Any:
    """Give a schema in which no way to the end was found: of digits only 0 was looked at, again and again."""
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5}
    properties = {"a": number, "b": {"type": "array", "items": number, "minItems": 2, "maxItems": 3}}
    thing = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    return {"type": "array", "items": thing, "minItems": 0, "maxItems": 2}


def texts_of(runner: ModelRunner, schema: Any, seed: int, within: bool) -> None:
    pipe = Pipeline(plugin(Sample), [plugin(JsonSchema, schema=schema, complete_within=within)])
    requests = [request(pipe, tokenizer=TOKENIZER, seed=seed + n, max_new_tokens=90) for n in range(8)]
    for result in drive(runner, requests):
        text = "".join(TOKENS[token] for token in result.token_ids if token)
        ended = result.hypotheses[0].finish_reason in ("eos", "grammar_end")
        assert ended or not within, text
        if ended:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.slow
@settings(max_examples=125, deadline=None)
@given(SCHEMAS, st.integers(0, 9999), st.booleans())
@example(objects_of_positive_numbers(), 133, True)
def test_every_text_that_ends_is_valid(schema: Any, seed: int, within: bool) -> None:
    texts_of(TableModel(len(TOKENS), seed=seed, memory=2), schema, seed, within)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(SCHEMAS, st.integers(0, 9999), st.booleans())
def test_every_text_of_a_network_that_ends_is_valid(schema: Any, seed: int, within: bool) -> None:
    texts_of(HuggingFaceRunner(tiny_model("llama")), schema, seed, within)


def values(schema: Any) -> st.SearchStrategy[Any]:
    """Draw values that a schema takes, their properties in its order."""
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if isinstance(kind, list):
        return st.one_of([values({**schema, "type": each}) for each in kind])
    if kind == "object":
        needed = schema["required"]
        free = {key: values(inner) for key, inner in schema["properties"].items()}
        kept = st.sets(st.sampled_from(sorted(free))) if free else st.just(set())
        return st.tuples(st.fixed_dictionaries(free), kept).map(
            lambda drawn: {key: drawn[0][key] for key in free if key in needed or key in drawn[1]}
        )
    if kind == "array":
        return st.lists(values(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
    if kind == "string" and "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True)
    if kind == "string":
        letters = st.characters(exclude_categories=["Cs", "Cc"])
        return st.text(letters, min_size=schema.get("minLength", 0), max_size=schema["maxLength"])
    if kind == "integer":
        step = schema.get("multipleOf", 1)
        return st.integers(-(-schema["minimum"] // step), schema["maximum"] // step).map(lambda count: count * step)
    if kind == "number":
        return st.integers(1, 95).map(lambda tenths: tenths / 10)
    return st.booleans() if kind == "boolean" else st.none()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_value_that_a_schema_takes_can_come(data: st.DataObject) -> None:
    schema = data.draw(SCHEMAS)
    text = json.dumps(data.draw(values(schema)), separators=(",", ":"), ensure_ascii=False)
    position: Any = ENGINE.compile(Schema(json.dumps(schema), True), BYTES).start()
    for byte in text.encode():
        position = position.advance(byte)
        assert position is not None, (schema, text)
    assert position.may_stop, (schema, text)
