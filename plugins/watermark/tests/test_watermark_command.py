"""`unspool watermark detect`: what it reads, what it says, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import unspool
from unspool.cli import app
from unspool_testing.table import TableModel

GREEN = "green_list:key=swordfish,delta=5"
CONFIG = """
strategy: sample
plugins:
  - green_list: {key: swordfish, delta: 5}
profiles:
  other: {plugins: [{green_list: {key: marlin}}]}
  both: {plugins: [{tournament: swordfish}]}
"""


def detect(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["watermark", "detect", *map(str, arguments)], input=stdin, terminal_width=200)


def judged(*arguments: object, stdin: bytes | None = None) -> list[dict[str, Any]]:
    result = detect(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    texts: list[dict[str, Any]] = json.loads(result.stdout)["texts"]
    return texts


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Write a marked request of two texts, one that fails, and a plain one."""
    marked: Any = {"strategy": "sample", "plugins": [GREEN], "n": 2}
    requests = [
        unspool.Request(prompt=[3, 4], id="marked", max_new_tokens=60, seed=1, **marked),
        unspool.Request(prompt="no tokenizer", id="failed", strategy="sample"),
        unspool.Request(prompt=[3, 4], id="plain", max_new_tokens=60, seed=1, strategy="sample"),
        unspool.Request(prompt=[3, 4], id="short", max_new_tokens=0 + 1, seed=1, strategy="sample"),
    ]
    with unspool.Engine(TableModel(vocab_size=64, spread=1.0), slots=512) as engine:
        return [result.to_dict() for result in engine.run(requests, ordered=True)]


def written(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def results(records: list[dict[str, Any]], tmp_path: Path) -> Path:
    return written(tmp_path / "results.jsonl", records)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_every_text_of_a_file_of_results_is_judged(results: Path, config: Path) -> None:
    texts = judged(results, "-c", config)
    assert [(text["id"], text["hypothesis"], text["marked"]) for text in texts] == [
        ("marked", 1, True),
        ("marked", 2, True),
        ("plain", 1, False),
        ("short", 1, False),
    ]
    assert {text["watermark"] for text in texts} == {"green_list"}
    assert all(text["z"] > 5 for text in texts[:2]) and abs(texts[2]["z"]) < 4
    assert all(text["expected"] == 0.25 for text in texts)
    assert texts[3]["scored"] == 1, "the prompt is context, so the first new token is judged"


def test_the_table_says_the_same(results: Path, config: Path) -> None:
    result = detect(results, "-c", config)
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["text", "watermark", "scored", "score", "chance", "z", "p-value", "verdict"]
    texts = judged(results, "-c", config)
    for line, text in zip(lines, texts, strict=False):
        verdict = "marked" if text["marked"] else "not marked"
        name = text["id"] + (" #2" if text["hypothesis"] == 2 else "")
        numbers = f"{text['scored']} {text['score']:.3f} 0.250 {text['z']:.2f} {text['p_value']:.2g}"
        assert " ".join(line.split()) == f"{name} green_list {numbers} {verdict}"


def test_a_text_in_which_nothing_can_be_judged_is_too_short(tmp_path: Path, config: Path) -> None:
    path = written(tmp_path / "r.jsonl", [{"id": "a", "hypotheses": [{"text": "x", "token_ids": [1]}]}])
    assert detect(path, "-c", config).stdout.splitlines()[1].endswith("too short")
    assert judged(path, "-c", config)[0]["marked"] is False


def test_the_key_is_not_told(results: Path, config: Path) -> None:
    for arguments in (["-c", config], ["-p", GREEN]):
        for form in ([], ["--json"]):
            result = detect(results, *arguments, *form)
            assert result.exit_code == 0 and "swordfish" not in result.output


def test_profiles_and_options_name_watermarks_as_they_do_for_run(results: Path, config: Path) -> None:
    assert not any(text["marked"] for text in judged(results, "-c", config, "--profile", "other"))
    assert [text["watermark"] for text in judged(results, "-c", config, "--profile", "both")[:2]] == [
        "green_list",
        "tournament",
    ]
    assert judged(results, "-p", GREEN) == judged(results, "-c", config)
    assert judged(results, "-c", config, "-p", "green_list:gamma=0.5")[0]["expected"] == 0.5


def test_threshold_or_false_positives_decide(results: Path, config: Path) -> None:
    texts = judged(results, "-c", config)
    z, p = texts[0]["z"], texts[0]["p_value"]
    for options, marked in [
        (("--threshold", z * 0.999), True),
        (("--threshold", z * 1.001), False),
        (("--fpr", p * 1.001), True),
        (("--fpr", p * 0.999), False),
    ]:
        assert judged(results, "-c", config, *options)[0]["marked"] is marked


def test_results_may_come_from_stdin(results: Path, config: Path) -> None:
    assert judged("-", "--results", "-c", config, stdin=results.read_bytes()) == judged(results, "-c", config)
    assert judged("--results", "-c", config, stdin=results.read_bytes()) == judged(results, "-c", config)


def error(*arguments: object, stdin: bytes | None = None) -> str:
    result = detect(*arguments, stdin=stdin)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return result.stderr


def test_what_is_wrong_is_said(results: Path, config: Path, tmp_path: Path) -> None:
    assert "no watermark is named: name green_list or tournament" in error(results)
    assert "plugins.green_list.key: Field required" in error(results, "-p", "green_list:gamma=0.5")
    assert "plugins.green_list.gamma" in error(results, "-p", "green_list:key=1,gamma=1.5")
    assert "no profile 'bth': did you mean 'both'?" in error(results, "-c", config, "--profile", "bth")
    assert "--fpr = 0.1: not together with --threshold" in error(results, "-p", GREEN, "--fpr", 0.1, "--threshold", 3)
    assert "--fpr = 2.0: a probability" in error(results, "-p", GREEN, "--fpr", 2)
    assert "--threshold = 0.0: a number above 0" in error(results, "-p", GREEN, "--threshold", 0)
    assert "--threshold = nan" in error(results, "-p", GREEN, "--threshold", "nan")
    assert "a file that can be read: No such file" in error(tmp_path / "none.txt", "-p", GREEN)
    assert "at least one character" in error("-p", GREEN, stdin=b"\n")
    assert "UTF-8" in error("-p", GREEN, stdin=b"\xff")
    missing = error(results, "-p", f"green_list:key={{file: {tmp_path / 'none'}}}")
    assert "plugins.green_list.key.file" in missing and "No such file" in missing


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", "{}", '{"id": "a", "hypotheses": [{}]}', '{"id": "a", "hypotheses": [{"token_ids": ["x"]}]}'],
)
def test_a_line_that_is_no_result_is_named(line: str, results: Path) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert "results of `unspool run`, which line 6 is not" in error(results, "-p", GREEN)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from unspool.cli import app; "
        "result = CliRunner().invoke(app, ['watermark', 'detect', '--help']); "
        "assert '--threshold' in result.output, result.output; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- texts of the real model -----------------------------------------------------------------------------------------

SAID = "Once upon a time there was a lighthouse, and in it lived a keeper who wrote letters to ships."


@pytest.mark.real_model
def test_a_text_is_cut_by_the_models_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from unspool.huggingface.load import local_folder

    tokenizer = AutoTokenizer.from_pretrained(local_folder("smollm2"))
    ids = tokenizer.encode(SAID, add_special_tokens=False)
    file = tmp_path / "text.txt"
    file.write_text(SAID + "\n", encoding="utf-8")
    known = {"id": "x", "hypotheses": [{"text": SAID, "token_ids": ids}]}
    bare = {"id": "x", "hypotheses": [{"text": SAID}]}
    several = judged(written(tmp_path / "results.jsonl", [known, bare]), "-p", GREEN)
    assert several[0] == several[1] and several[0]["scored"] > 15
    for text in (*judged(file, "-p", GREEN), *judged("-p", GREEN, stdin=SAID.encode())):
        assert {**text, "id": "x"} == several[0]


@pytest.mark.real_model
def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "tokenizer of" in error("-p", GREEN, "--model", tmp_path, stdin=b"text")
