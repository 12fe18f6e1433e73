"""What a schema forbids never comes, what it allows can come, and what cannot be enforced is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from unspool.errors import ConfigError, InputError
from unspool.pipeline import Pipeline, PluginSpec, build_pipeline
from unspool.registry import Registry
from unspool.request import Hypothesis
from unspool_constrained.engine import GrammarError
from unspool_constrained.guidance import ENGINE
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.languages import Schema
from unspool_constrained.vocabulary import Vocabulary
from unspool_greedy import Greedy
from unspool_testing.driver import alone, plugin, request
from unspool_testing.letters import tokenizer_of
from unspool_testing.table import TableModel

BYTES = Vocabulary([bytes([byte]) for byte in range(256)], lambda text: list(text.encode()))


def takes(schema: Any, text: str, *, compact: bool = True) -> bool:
    position = ENGINE.compile(Schema(json.dumps(schema), compact), BYTES).start()
    for byte in text.encode("utf-8", "surrogatepass"):
        after = position.advance(byte)
        if after is None:
            return False
        position = after
    return position.may_stop


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
        ({"type": "strin"}, "strin"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
    ],
)
def test_what_cannot_be_enforced_is_refused_when_the_config_is_read(schema: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=r"json_schema.*schema = ") as caught:
        build_pipeline(PluginSpec("greedy"), [PluginSpec("json_schema", {"schema": schema})], Registry.installed())
    assert word in str(caught.value) and len(str(caught.value)) < 600


def test_properties_come_in_order_and_whitespace_as_it_is_asked_for() -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"type": "null"}, "a": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    }
    texts = ['{"b":null}', '{"b":null,"a":null}', '{"a":null,"b":null}', '{ "b": null }', '{"a":null}']
    assert [takes(schema, text) for text in texts] == [True, True, False, False, False]
    assert [takes(schema, text, compact=False) for text in texts] == [True, True, False, True, False]


class Answer(BaseModel):
    name: str
    age: int


def test_a_schema_comes_from_a_dict_a_model_an_imported_module_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(Answer.model_json_schema()), encoding="utf-8")
    given = [Answer, Answer.model_json_schema(), f"{__name__}:Answer", str(file)]
    assert {json.dumps(JsonSchema.Params(schema=one).schema) for one in given[:2]} == {
        json.dumps(Answer.model_json_schema())
    }
    assert JsonSchema.Params(schema=str(file)).schema == Answer.model_json_schema()


def test_a_model_is_taken_from_what_is_imported_and_nothing_is_imported_for_it() -> None:
    import sys

    name = "xmlrpc.server"
    sys.modules.pop(name, None)
    with pytest.raises(ValidationError, match="imported already"):
        JsonSchema.Params(schema=f"{name}:Anything")
    assert name not in sys.modules
    with pytest.raises(ValidationError, match="imported already"):
        JsonSchema.Params(schema="pathlib:Path")
    assert JsonSchema.Params(schema="unspool.plugin:Parameters").schema["type"] == "object"


@pytest.mark.parametrize("path", ["/etc/passwd", "nowhere.json", "", "schema.yaml"])
def test_a_path_that_is_no_json_file_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match=r"\.json"):
        JsonSchema.Params(schema=path)


def test_the_report_holds_the_value_of_a_complete_text() -> None:
    tokens = ["<end>", "{", "}", '"a"', ":", "1", ",", "[", "]"]
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 11]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    pipe = Pipeline(plugin(Greedy), [plugin(JsonSchema, schema=schema)])
    tokenizer = tokenizer_of(tokens, ["<end>"])
    for most, complete in ((9, True), (3, False)):
        [result] = alone(TableModel(len(tokens), seed=1), [request(pipe, max_new_tokens=most, tokenizer=tokenizer)])
        assert result.reports["jsonschema"]["complete"] == [complete]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [('{"a":[1,"x"]}', {"a": [1, "x"]}), ("1e999", None), ("[" * 100_000 + "]" * 100_000, None), ("9" * 5000, None)],
)
def test_numbers_and_depths_that_python_cannot_hold_are_left_out_of_the_report(text: str, parsed: Any) -> None:
    made = plugin(JsonSchema, schema={})
    one = request(Pipeline(plugin(Greedy), [made]), tokenizer=None)
    report = made.report(one, None, [Hypothesis((1,), "grammar_end", text=text)])
    assert report.get("parsed") == parsed and report["complete"] == [True]
    json.dumps(report, allow_nan=False)


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


PATTERNS = [{"pattern": f"a{{{n}}}.*b"} for n in range(1, 30)]
CHAIN = {"$defs": {f"d{n}": {"pattern": f"a{n}", "$ref": f"#/$defs/d{n + 1}"} for n in range(30)}, "$ref": "#/$defs/d0"}
CHAIN["$defs"]["d30"] = {"type": "string"}  # type: ignore[index]
BOMB = {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}, "$ref": "#/$defs/d0"}
BOMB["$defs"]["d40"] = {"type": "string", "pattern": "a+"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "allOf": PATTERNS}, "at most 8"),
        ({"type": "string", "allOf": [{"allOf": PATTERNS[:15]}, {"allOf": PATTERNS[15:]}]}, "at most 8"),
        (CHAIN, "at most 8"),
        (BOMB, "at most 8"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
        ({"type": "number", "multipleOf": 1.23456789}, "multipleOf"),
        (nested(60), "levels"),
        (nested(400), "levels"),
        ({"description": "x" * 1_000_001}, "characters"),
    ],
)
def test_schemas_that_would_take_minutes_to_compile_are_refused_at_once(schema: Any, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        JsonSchema.language(JsonSchema.Params(schema=schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "minItems": 10**6, "items": {"type": "integer"}},
        {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
        {"anyOf": [{"type": "object", "properties": {f"k{n}": {}}, "required": [f"k{n}"]} for n in range(500)]},
        {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
        nested(20),
    ],
)
def test_large_schemas_that_do_compile_are_taken(schema: Any) -> None:
    ENGINE.compile(JsonSchema.language(JsonSchema.Params(schema=schema)), BYTES)


def test_a_schema_that_is_refused_fails_its_own_request_and_says_which_field() -> None:
    pipe = Pipeline(plugin(Greedy), [plugin(JsonSchema, schema={"type": "boolean"})])
    bad = request(
        pipe,
        tokenizer=tokenizer_of(["<end>", "true"], ["<end>"]),
        parameters={"jsonschema": JsonSchema.Params(schema={"not": {}})},
    )
    with pytest.raises(InputError, match=r"jsonschema.schema = .*not"):
        alone(TableModel(2), [bad])
    with pytest.raises(InputError, match="tokenizer = None: a model with a tokenizer"):
        alone(TableModel(2), [request(pipe)])
