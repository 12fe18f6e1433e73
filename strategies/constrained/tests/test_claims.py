"""Claims of schemas, grammars and tags say what others say of the same texts, and laws see by them what is wrong."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import hookimpl
from unspool.step import Step
from unspool_constrained.constraint import Constraint
from unspool_constrained.grammar import ContextFree
from unspool_constrained.grammar_claims import Grammar, rules_of_grammar, standing
from unspool_constrained.guidance import ENGINE
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.schema_claims import JsonSchema as JsonSchemaClaims
from unspool_constrained.schema_claims import rules_of_schema
from unspool_constrained.tag_claims import Tagged as TaggedClaims
from unspool_constrained.tagged import Tagged
from unspool_constrained.vocabulary import vocabulary_of
from unspool_testing.laws import LAWS
from unspool_testing.letters import tokenizer_of
from unspool_testing.proof import prove
from unspool_testing.subject import Subject

KINDS: dict[type[Constraint], type] = {ContextFree: Grammar, JsonSchema: JsonSchemaClaims, Tagged: TaggedClaims}


def agree(kind: type[Constraint], characters: str, most: int, **said: Any) -> int:
    """Compare claims with masks on every text of so many characters that may come; give how many are whole."""
    tokenizer = tokenizer_of(["<end>", *characters], ["<end>"])
    request: Any = SimpleNamespace(tokenizer=tokenizer, end_ids=(0,))
    claims: Any = KINDS[kind]
    params = kind.Params(**said)
    found, start = 0, ENGINE.compile(kind.language(params), vocabulary_of(tokenizer)).start()
    waiting: list[tuple[tuple[int, ...], Any]] = [((), start)]
    while waiting:
        tokens, position = waiting.pop()
        text = "".join(characters[token - 1] for token in tokens)
        assert claims.allows(params, request, (*tokens, 0), True) == position.may_stop, text
        if tokens:
            expected = "grammar_end" if position.has_stopped else None
            assert claims.finishes(params, request, tokens) == expected, text
        found += position.may_stop
        for token in range(1, len(characters) + 1):
            after = position.advance(token)
            allows = claims.allows(params, request, (*tokens, token), False)
            assert allows == (after is not None), text + characters[token - 1]
            if after is not None and len(tokens) + 1 < most:
                waiting.append(((*tokens, token), after))
    return found


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "ab" | "a" "bc"',
        'root ::= "a" root "b" | "ab" root? | "c"',
        'root ::= root "a" | "b"',
        'root ::= ("[" root "]" | )+ "a"',
        'root ::= x{2,3} [^a]\nx ::= [b-c] | x "a"',
        'root ::= "a"* ("b"{2} | "c"?){1,2}',
        'root ::= "a" x | "b" ("c" x)* | "c" x? root\nx ::= "b" x',
        'start: "[" start "]" | "a"',
        r"start: /[a1]/ start | /\]/",
        'start: rest? "a"\nrest: ("b" | /[^ab1]/)+ | rest "1"',
    ],
)
def test_a_grammar_is_what_the_engine_takes_it_for(grammar: str) -> None:
    assert agree(ContextFree, "abc[]1", 4, grammar=grammar) > 0


@pytest.mark.parametrize(
    "grammar", ['start: "ab" | "a" "bc"', "start: A\nA: /a+/", "start: /a+/", 'start: %json {"type": "null"}']
)
def test_lark_with_longer_terminals_is_left_open(grammar: str) -> None:
    with pytest.raises(NotImplementedError, match="more than a character"):
        rules_of_grammar(grammar)


def test_what_can_never_be_completed_begins_nothing() -> None:
    rules = rules_of_grammar('root ::= "a" x | "b" | "c" y\nx ::= "c" x\ny ::= y')
    assert [standing(rules, text).takes(ended=False) for text in ("", "a", "ac", "b", "c")] == [
        True,
        False,
        False,
        True,
        False,
    ]


SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "integer"}, "-01"),
    ({"type": "number"}, "-01.e"),
    ({"enum": [1, 11, [], [1], [1, [1]], {"a": 1}]}, '[]1,{}"a:'),
    ({"type": "array", "items": {"type": "array"}, "maxItems": 2}, "[],1"),
    ({"type": "array", "items": {"type": "array", "items": {"const": 1}}}, "[],1"),
    ({"type": "array", "items": {"enum": [1, 11]}, "minItems": 2, "maxItems": 3}, "[],1"),
    ({"type": "string", "minLength": 1, "maxLength": 2}, '"a\\'),
    ({"type": ["string", "integer"], "maxLength": 1}, '"a1'),
    (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"enum": [1, 11]}}, "additionalProperties": False},
        '{}"ab:1,',
    ),
    (
        {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 1}, "aa": {"const": 1}},
            "required": ["b"],
            "additionalProperties": False,
        },
        '{}"ab:1,',
    ),
    (
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}},
        },
        "[],1",
    ),
    ({"type": "array", "items": {"$ref": "#"}, "title": "nested"}, "[],1"),
    ({}, '{}"a:1,[]'),
]


@pytest.mark.parametrize(("schema", "characters"), SCHEMAS)
@pytest.mark.parametrize("whitespace", ["compact", "flexible"])
def test_a_schema_is_what_the_engine_takes_it_for(schema: Any, characters: str, whitespace: str) -> None:
    longest = 3 if schema == {} else 13 if "properties" in schema and whitespace == "compact" else 4
    agree(JsonSchema, characters + " " * (whitespace == "flexible"), longest, schema=schema, whitespace=whitespace)


@pytest.mark.parametrize(("schema", "characters"), SCHEMAS[:8])
def test_a_schema_takes_what_jsonschema_takes(schema: Any, characters: str) -> None:
    is_valid = jsonschema.Draft202012Validator(schema).is_valid
    for length in range(6 if len(characters) < 6 else 4):
        for text in map("".join, product(characters, repeat=length)):
            whole = standing(rules_of_schema(json.dumps(schema)), text).whole
            try:
                value = json.loads(text)
            except ValueError:
                assert not whole, text
                continue
            if not isinstance(value, float) or schema["type"] == "number":  # 1.0 is an integer, and written otherwise
                assert whole == is_valid(value), text


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": "a"},
        {"const": 1.0},
        {"const": "é"},
        {"type": "object", "properties": {"a": {}}},
        {"items": {"type": "null"}},
        {"enum": [1], "type": "integer"},
    ],
)
def test_a_schema_that_says_more_than_is_known_is_left_open(schema: Any) -> None:
    with pytest.raises(NotImplementedError):
        rules_of_schema(json.dumps(schema))


def tag(begin: str, end: str, **inner: Any) -> dict[str, Any]:
    return {"begin": begin, "end": end, **inner}


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    "tags",
    [
        [tag("[", "]", regex="a+")],
        [tag("a", "a", json_schema={"type": "array"})],
        [tag("a", "a", regex="(1|a1)*")],
        [tag("a", "]", regex="1*\\]?")],
        [tag("1a", "]", regex="1"), tag("a", "]", regex="a")],
        [tag("1a", "]", regex="1"), tag("a[", "]", regex="a")],
        [tag("aa", "[]", grammar='root ::= "1" root? "a"'), tag("[", "11", grammar="start: /[a]/")],
    ],
)
def test_tags_are_what_the_engine_takes_them_for(tags: list[dict[str, Any]], required: bool) -> None:
    assert agree(Tagged, "a[]1", 5, tags=tags, required=required) > 0


def test_an_end_marker_that_could_be_more_of_the_tag_leaves_the_claim_open() -> None:
    params = Tagged.Params(tags=[tag("[", "1]", json_schema={"type": "integer"})])
    request: Any = SimpleNamespace(tokenizer=tokenizer_of(["<end>", "[", "1"], ["<end>"]), end_ids=(0,))
    assert TaggedClaims.allows(params, request, (1,), False)
    with pytest.raises(NotImplementedError, match="end marker"):
        TaggedClaims.allows(params, request, (1, 2), False)


class ForgetsAKeyword(JsonSchema):
    """Its masks are right, for another schema."""

    @classmethod
    def language(cls, params: Any) -> Any:
        kept = {key: value for key, value in params.schema.items() if key != "maxItems"}
        return super().language(params.model_copy(update={"schema": kept}))


class ForgetsAnAlternative(ContextFree):
    """Its masks are too narrow."""

    @classmethod
    def language(cls, params: Any) -> Any:
        return super().language(params.model_copy(update={"grammar": params.grammar.replace("[a1]", "[1]")}))


class EndsEarly(Tagged):
    """A text may end wherever it stands."""

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        given = logits[:, 0].clone()
        Tagged.logits_transform(self, step, logits)
        for row, number in enumerate(step.request.tolist()):
            if 0 in step.requests[number].end_ids:
                logits[row, 0] = given[row]


class NeverFinishes(ContextFree):
    """It waits for an end token where nothing else can come."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        pass


class FinishesEarly(JsonSchema):
    """It ends a text as soon as it may stop."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        for child, place in enumerate(growth.states(self)):
            if place is not None and place.position.may_stop:
                growth.finish[child] = "grammar_end"


@pytest.mark.parametrize(
    ("kind", "law", "said"),
    [
        (ForgetsAKeyword, "constraint", {"schema": {"type": "array", "items": {"type": "array"}, "maxItems": 0}}),
        (ForgetsAnAlternative, "constraint", {"grammar": r"start: /[a1]/ start | /\]/"}),
        (EndsEarly, "constraint", {}),
        (NeverFinishes, "reference", {}),
        (FinishesEarly, "reference", {}),
    ],
)
def test_a_law_sees_by_the_claims_what_is_wrong(kind: type[Constraint], law: str, said: dict[str, Any]) -> None:
    params = {**said, "complete_within": False}
    told, untold = (
        prove(LAWS[law], Subject.find(kind, params=params, claims=claims), shrink=False)
        for claims in (KINDS[kind.__mro__[1]], None)
    )
    assert told.status == "broken" and "claims" in told.reason, told
    assert untold.status in ("held", "not_applicable"), untold
