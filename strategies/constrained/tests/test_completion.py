"""Ways to the end: they end a text, are followed rightly, and are not looked for anew where the old one will do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_constrained.completion import Finder
from unspool_constrained.engine import Position
from unspool_constrained.guidance import ENGINE
from unspool_constrained.languages import Language, Lark, Pattern, Schema, Strings
from unspool_constrained.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    [*(bytes([byte]) for byte in range(256)), b"", b"ab", b'",', b'"}', b'":'], lambda text: list(text.encode())
)
SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}}, '
    '"required": ["a", "b"], "additionalProperties": false}'
)
LANGUAGES: dict[str, Language] = {
    "schema": Schema(SCHEMA, compact=True),
    "repeats": Pattern("a{2,6}(b|ba)?"),
    "open": Pattern("[ab]+(1{2})*"),
    "choices": Strings(("yes", "yesterday", "no")),
    "nested": Lark('start: "(" start ")" | "x"+'),
}


def allowed(position: Position) -> list[int]:
    bits = np.unpackbits(ENGINE.masks([position])[0], bitorder="little")
    return [] if position.has_stopped else np.flatnonzero(bits).tolist()


def walk(data: st.DataObject, position: Position, most: int) -> tuple[list[int], Position]:
    tokens: list[int] = []
    for _ in range(data.draw(st.integers(0, most))):
        choices = allowed(position)
        if not choices:
            break
        tokens.append(data.draw(st.sampled_from(choices)))
        after = position.advance(tokens[-1])
        assert after is not None
        position = after
    return tokens, position


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(LANGUAGES)), st.booleans(), st.booleans())
def test_tokens_close_a_text_where_walking_them_does(
    data: st.DataObject, name: str, with_end: bool, strays: bool
) -> None:
    _, position = walk(data, ENGINE.compile(LANGUAGES[name], VOCABULARY).start(), 12)
    tokens, _ = walk(data, position, 8)
    if strays:
        tokens.append(data.draw(st.integers(0, len(VOCABULARY) - 1)))
    at: Position | None = position
    closed = []
    for taken in range(len(tokens) + 1):
        if at is None:
            break
        if at.has_stopped or (with_end and at.may_stop):
            closed.append(taken)
        at = at.advance(tokens[taken]) if taken < len(tokens) else None
    found = position.closes_after(tokens, with_end=with_end)
    if not closed:
        assert found is None
    else:
        assert found in closed
        assert found in (closed[0], len(tokens))
        if closed[0] == 0:
            assert found == 0


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(LANGUAGES)), st.booleans())
def test_the_way_of_each_place_ends_the_text(data: st.DataObject, name: str, ends: bool) -> None:
    finder = Finder(ENGINE, VOCABULARY, ends)
    position = ENGINE.compile(LANGUAGES[name], VOCABULARY).start()
    way = finder.search(position)
    for _ in range(data.draw(st.integers(0, 12))):
        choices = allowed(position)
        if not choices:
            break
        token = data.draw(st.sampled_from(choices))
        after = position.advance(token)
        assert after is not None
        position, way = after, finder.after(way, token, after)
        if way is not None:
            at: Position | None = position
            for step in way:
                assert at is not None
                at = at.advance(step)
            assert at is not None and finder.closed(at)


def test_a_way_says_no_more_than_it_has_to() -> None:
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5}
    numbers = {"type": "array", "items": number, "minItems": 2, "maxItems": 3}
    thing = {"type": "object", "properties": {"a": number, "b": numbers}, "required": ["a", "b"]}
    schema = json.dumps({**thing, "additionalProperties": False})
    way = Finder(ENGINE, VOCABULARY, True).first(ENGINE.compile(Schema(schema, compact=True), VOCABULARY))
    assert way is not None
    text = b"".join(VOCABULARY.tokens[token] for token in way).decode()
    assert json.loads(text) and len(text) <= len('{"a":0.1,"b":[0.1,0.1]}')


@pytest.mark.parametrize(
    ("text", "token", "places"),
    [
        ('{"a":"', "b", 0),  # the way goes on as before
        ('{"a":"b', '",', 0),  # it has begun, in other tokens
        ('{"a":"b","b":[', "1", 0),  # its end will do
        ('{"a":"b","b":[1', ",", 2),  # it will do after two tokens more: a sign is tried before a digit
    ],
)
def test_an_old_way_is_used_as_far_as_it_goes(
    text: str, token: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = Finder(ENGINE, VOCABULARY, True)
    position: Any = ENGINE.compile(LANGUAGES["schema"], VOCABULARY).start()
    for byte in text.encode():
        position = position.advance(byte)
    way = finder.search(position)
    number = VOCABULARY.tokens.index(token.encode())
    after = position.advance(number)
    looked_at: list[Position] = []
    own = Finder._candidates

    def candidates(self: Finder, place: Position) -> list[int]:
        looked_at.append(place)
        return own(self, place)

    monkeypatch.setattr(Finder, "_candidates", candidates)
    found = finder.after(way, number, after)
    assert found is not None and after.closes_after(found, with_end=True) == len(found)
    assert len(looked_at) == places
