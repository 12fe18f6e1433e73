"""The laws of the test kit, on constraints over tables whose tokens are chosen for each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import regex as partial  # type: ignore[import-untyped]

from unspool.plugin import Plugin
from unspool.request import PreparedRequest
from unspool_constrained import claims
from unspool_constrained.any_json import AnyJson
from unspool_constrained.choices import Choices
from unspool_constrained.constraint import Constraint
from unspool_constrained.grammar import ContextFree
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.regex import Regex
from unspool_constrained.tagged import Tagged
from unspool_constrained.vocabulary import Vocabulary, vocabulary_of
from unspool_testing.expected import laws_of
from unspool_testing.letters import tokenizer_of
from unspool_testing.proof import prove
from unspool_testing.subject import Subject

LETTERS = ["<end>", "a", "[", "]", "1", "[a"]
MARKS = ["<end>", "1", "[", "]", ",", "[1"]


def lettered(kind: type[Constraint], tokens: Sequence[str], said: type) -> tuple[type[Plugin], type]:
    """Give a plugin whose tokens are fixed, and its claims with the same."""
    tokenizer = tokenizer_of(tokens, ["<end>"])

    class Lettered(kind):  # type: ignore[valid-type, misc]
        def vocabulary(self, request: PreparedRequest) -> Vocabulary:
            return vocabulary_of(tokenizer)

    class Claims:
        @staticmethod
        def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
            allowed: bool = said.allows(params, replace(request, tokenizer=tokenizer), tokens, ended)  # type: ignore[attr-defined]
            return allowed

    Lettered.__name__ = kind.__name__
    return Lettered, Claims


def texts(tokens: Sequence[str], most: int, is_in: Callable[[str], bool]) -> type:
    """Claim a language by going through all texts of at most so many characters."""
    alphabet = sorted({character for token in tokens[1:] for character in token})
    whole = {t for n in range(most + 1) for t in map("".join, product(alphabet, repeat=n)) if is_in(t)}
    beginnings = {text[:n] for text in whole for n in range(len(text) + 1)}

    class Listed:
        @staticmethod
        def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
            text = claims.text_of(request, tokens, ended)
            return text in (whole if ended else beginnings)

    return Listed


def asks(is_whole: Callable[[str], bool], is_beginning: Callable[[str], bool]) -> type:
    """Claim a language by two questions."""

    class Asked:
        @staticmethod
        def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
            text = claims.text_of(request, tokens, ended)
            return text is not None and (is_whole if ended else is_beginning)(text)

    return Asked


def balanced(text: str, *, whole: bool = True) -> bool:
    opened, closed = text.count("["), text.count("]")
    shape = r"\[*a\]*" if whole else r"\[*(a\]*)?"
    return re.fullmatch(shape, text) is not None and (opened == closed if whole else opened >= closed)


TAGGED = partial.compile(r"[^\[]*(\[a+\][^\[]*)*")


def takes(schema: Any) -> Callable[[str], bool]:
    import jsonschema  # type: ignore[import-untyped]

    def is_in(text: str) -> bool:
        try:
            value = json.loads(text)
        except ValueError:
            return False
        return json.dumps(value, separators=(",", ":")) == text and jsonschema.Draft202012Validator(schema).is_valid(
            value
        )

    return is_in


NESTED = {
    "$ref": "#/$defs/a",
    "$defs": {"a": {"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}},
}
PAIRS = {"type": "array", "items": {"enum": [1, 11]}, "minItems": 1, "maxItems": 3}
SUBJECTS: dict[str, tuple[type[Constraint], Sequence[str], dict[str, Any], type]] = {
    "choices": (Choices, LETTERS, {}, claims.Choices),
    "regex": (Regex, LETTERS, {}, claims.Regex),
    "json": (AnyJson, MARKS, {"value": "any"}, claims.AnyJson),
    "json_schema": (JsonSchema, MARKS, {"schema": PAIRS}, texts(MARKS, 10, takes(PAIRS))),
    "json_schema, recursive": (JsonSchema, MARKS, {"schema": NESTED}, texts(MARKS, 9, takes(NESTED))),
    "grammar": (
        ContextFree,
        LETTERS,
        {"grammar": 'root ::= "[" root "]" | "a"'},
        asks(balanced, lambda text: balanced(text, whole=False)),
    ),
    "tagged": (
        Tagged,
        LETTERS,
        {"tags": [{"begin": "[", "end": "]", "regex": "a+"}], "required": False},
        asks(lambda text: bool(TAGGED.fullmatch(text)), lambda text: bool(TAGGED.fullmatch(text, partial=True))),
    ),
}


def cases() -> list[Any]:
    found = []
    for name, (kind, tokens, params, said) in SUBJECTS.items():
        made, claimed = lettered(kind, tokens, said)
        # A request that is too short to be completed is refused, which the kit takes for a fault.
        subject = Subject.find(made, params={**params, "complete_within": False}, claims=claimed)
        for law in laws_of(subject):
            marks = () if law.name == "constraint" else pytest.mark.slow
            found.append(pytest.param(law, subject, id=f"{name}: {law.name}", marks=marks))
    return found


@pytest.mark.parametrize(("law", "subject"), cases())
def test_every_law_holds(law: Any, subject: Subject) -> None:
    verdict = prove(law, subject, examples=15)
    assert verdict.status != "broken", verdict.counterexample
