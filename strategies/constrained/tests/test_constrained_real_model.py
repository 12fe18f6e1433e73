"""On the real model: JSON that is extracted, a choice, a date, and texts that are the same with and without drafts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import unspool

pytestmark = pytest.mark.real_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "Ada is 36 years old. Write her name and age as JSON."


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        yield engine


def test_a_person_is_extracted_as_json(engine: unspool.Engine) -> None:
    result = engine.generate(
        PROMPT, strategy="greedy", plugins=[{"json_schema": {"schema": SCHEMA}}], max_new_tokens=30
    )
    assert result.reports["json_schema"] == {"complete": [True], "parsed": json.loads(result.text)}
    assert json.loads(result.text) == {"name": "Ada", "age": 36}


def test_forced_text_is_drafted_and_changes_nothing(engine: unspool.Engine) -> None:
    texts = []
    for drafts in (True, False):
        schema: dict[str, Any] = {"schema": SCHEMA, "draft_forced": drafts}
        result = engine.generate(PROMPT, strategy="greedy", plugins=[{"json_schema": schema}], max_new_tokens=30)
        texts.append(result.token_ids)
        assert (result.stats.drafted > 0) == drafts
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("plugin", "pattern"),
    [
        ({"choices": ["positive", "negative"]}, "positive|negative"),
        ({"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"}, "[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        ({"grammar": 'root ::= "(" root ")" | [a-z]+ "!"'}, r"\(*[a-z]+!\)*"),
        ({"json": {"value": "array", "complete_within": True}}, r"\[.*\]"),
    ],
)
def test_samples_are_in_the_language(engine: unspool.Engine, plugin: Any, pattern: str) -> None:
    result = engine.generate(PROMPT, strategy="sample", plugins=[plugin], max_new_tokens=24, seed=1)
    if result.hypotheses[0].finish_reason in ("eos", "grammar_end"):
        assert re.fullmatch(pattern, result.text, re.DOTALL)
    else:
        assert "grammar" in plugin
