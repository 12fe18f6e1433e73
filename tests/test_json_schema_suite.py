"""The official JSON-Schema-Test-Suite, which is outside data: nothing invalid is taken, and its page is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generate
import json_schema_suite as suite
import pytest

needs_the_suite = pytest.mark.skipif(not suite.is_there(), reason=suite.ABSENT)


@needs_the_suite
def test_no_invalid_instance_of_what_is_required_is_ever_taken() -> None:
    required = [file for file in suite.run(suite.SUITE) if file.is_required]
    assert len(required) > 40 and sum(len(file.those(valid=False, taken=False)) for file in required) > 200
    assert not [each for file in required for each in file.those(valid=False, taken=True)]


@needs_the_suite
def test_the_page_says_what_becomes_of_it() -> None:
    assert generate.JSON_SCHEMAS.read_text(encoding="utf-8") == generate.json_schemas_page(), "run `make docs`"


@pytest.mark.usefixtures("without_the_suite")
def test_the_page_is_left_alone_where_the_suite_is_absent() -> None:
    assert generate.JSON_SCHEMAS not in generate.pages()


@pytest.mark.usefixtures("without_the_suite")
def test_a_check_says_what_it_could_not_look_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "out_of_date", dict)
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr().out == f"docs/json-schemas.md was not looked at: {suite.ABSENT}\n"


@pytest.fixture
def without_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "SUITE", tmp_path / "nowhere")


def tried(folder: Path, schema: Any, *instances: Any, valid: bool = True) -> suite.File:
    """Run a suite of one schema."""
    tests = [{"description": "an instance", "data": value, "valid": valid} for value in instances]
    group = {"description": "a schema", "schema": schema, "tests": tests}
    (folder / "one.json").write_text(json.dumps([group]), encoding="utf-8")
    [file] = suite.run(folder)
    return file


@pytest.mark.parametrize(
    ("schema", "value", "why"),
    [
        ({"properties": {"a": {}, "b": {}}}, {"b": 1, "a": [{"x": 1}]}, "properties are in another order"),
        ({"items": {"const": {"a": 1, "b": 2}}}, [{"b": 2, "a": 1}], "properties are in another order"),
        ({"const": {"a": [10]}}, {"a": [10.0]}, "number is written otherwise"),
        ({"type": "integer"}, 1e300, "number is written otherwise"),
        ({"properties": {"format": {"format": "ipv4"}}}, {"format": "x"}, "held to `format`"),
        ({"anyOf": [{"pattern": "^a$"}, {"type": "null"}]}, "b", "held to `pattern`"),
        ({"enum": ["a|b"]}, "c", 'narrower than the schema, `{"enum":["a|b"]}`'),
    ],
)
def test_why_an_instance_is_rejected_is_found_by_trying_others(
    tmp_path: Path, schema: Any, value: Any, why: str
) -> None:
    file = tried(tmp_path, schema, value)
    [missed] = file.those(valid=True, taken=False)
    assert why in suite.why_rejected(missed)
    assert why.replace("|", "\\|") in suite.page([file])


def test_an_invalid_instance_that_is_taken_stands_on_the_page(tmp_path: Path) -> None:
    file = tried(tmp_path, True, 1, "x", valid=False)
    assert len(file.those(valid=False, taken=True)) == 2 and not file.refused
    assert "| one | 1 | 0 | 0 | 0 | 0 | 2 |" in suite.page([file])
    assert suite.page([file]).count("| one | a schema | an instance |") == 2


@pytest.mark.parametrize(
    ("schema", "reasons"),
    [
        ({"if": {}, "then": {}}, ["`if`", "`then`"]),
        ({"items": {"format": "idn-email"}}, ["`format: idn-email`"]),
        ({"$ref": "https://example.com/x.json"}, ["`$ref` to another document"]),
        (False, ["nothing satisfies it"]),
        ({"x-guidance": {}}, ["a schema without `x-guidance`: the options are ours"]),
    ],
)
def test_what_cannot_be_enforced_is_named(tmp_path: Path, schema: Any, reasons: list[str]) -> None:
    file = tried(tmp_path, schema, 1)
    assert not file.instances and [reason for said in file.refused for reason in suite.why_refused(said)] == reasons
