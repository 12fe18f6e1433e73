"""`unspool check`: the table, the counterexamples, the exit codes, and the document for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unspool.cli import app
from unspool_testing.cli import law_names, read_params


def unspool(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def rows(shown: str) -> dict[str, list[str]]:
    """Give the words of each row of the table, by law."""
    lines = shown.split("\n\n", maxsplit=1)[0].splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.usefixtures("few_laws")
def test_the_table_has_a_row_for_each_law_and_the_counterexample_stands_below() -> None:
    result = unspool("kit_greedy", "-j", 1)
    assert result.exit_code == 1
    table = rows(result.stdout)
    assert list(table) == ["holds", "breaks", "holds_too", "is_about_others"]
    assert table["holds"][:2] == ["held", "9"]
    assert table["breaks"][0] == "broken" and " ".join(table["breaks"][3:]) == "it gave 3, not 4"
    assert " ".join(table["is_about_others"]) == "not applicable it is no beam"
    assert "\nbreaks: What breaks says.\n\nit gave 3, not 4\nand more\n" in result.stdout
    assert "\nWhy it matters: Why breaks matters.\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("2 held, 1 broken, 1 not applicable, in ")
    assert result.stderr == ""


@pytest.mark.usefixtures("few_laws")
def test_it_is_0_where_every_law_held() -> None:
    result = unspool("kit_greedy", "--law", "holds_too", "--law", "holds", "--examples", 4)
    assert result.exit_code == 0
    assert [*rows(result.stdout)] == ["holds", "holds_too"]
    assert rows(result.stdout)["holds"][1] == "4"


@pytest.mark.usefixtures("few_laws")
def test_what_is_expected_to_break_must_break() -> None:
    result = unspool("kit_greedy", "--expect", "breaks=it cannot count")
    assert result.exit_code == 0
    assert " ".join(rows(result.stdout)["breaks"]).startswith("broken as expected")
    assert "it cannot count" in result.stdout
    assert "Why it matters" not in result.stdout
    result = unspool("kit_greedy", "--law", "holds", "--expect", "holds=by mistake")
    assert result.exit_code == 1
    assert " ".join(rows(result.stdout)["holds"]).startswith("held unexpectedly")


@pytest.mark.usefixtures("few_laws")
def test_json_is_one_document_with_everything() -> None:
    result = unspool("kit_greedy", "--json", "--seed", 3, "--expect", "breaks=it cannot count")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert (record["plugin"], record["params"], record["seed"], record["ok"]) == ("kit_greedy", {}, 3, True)
    laws = {law["law"]: law for law in record["laws"]}
    assert [law["status"] for law in record["laws"]] == ["held", "broken", "held", "not_applicable"]
    assert laws["breaks"]["expected"] == "it cannot count"
    assert laws["breaks"]["case"].startswith("subject: greedy\n")
    assert "check_breaks" in laws["breaks"]["counterexample"]
    assert laws["is_about_others"]["reason"] == "it is no beam"
    assert unspool("kit_greedy", "--json").exit_code == 1


@pytest.mark.usefixtures("few_laws")
def test_verdicts_do_not_depend_on_the_number_of_processes() -> None:
    one, two = (unspool("kit_greedy", "--json", "-j", jobs) for jobs in (1, 2))
    documents = [json.loads(result.stdout) for result in (one, two)]
    for document in documents:
        for law in document["laws"]:
            law.pop("seconds")
    assert documents[0] == documents[1]


@pytest.mark.usefixtures("few_laws")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gredy"], "did you mean 'greedy'"),
        (["no_module:Nobody"], "cannot import it: ModuleNotFoundError"),
        (["kit_greedy", "--law", "hold"], "no such law: did you mean 'holds'? laws: holds, breaks"),
        (["kit_greedy", "--expect", "holds"], "LAW=REASON"),
        (["kit_greedy", "--expect", "is_about_others=why"], "it says nothing about kit_greedy (it is no beam)"),
        (["kit_greedy", "--params", "k=3"], "params.k: no such parameter: allowed: none"),
        (["top_k", "--params", "{k: "], "it cannot be read"),
        (["top_k", "--params", "off"], "switches the plugin off"),
        (["kit_greedy", "--examples", 0], "greater than or equal to 1"),
    ],
)
def test_wrong_input_is_2_and_no_traceback(arguments: list[object], message: str) -> None:
    result = unspool(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("text", ["3", "k=3", "{k: 3}", '{"k": 3}'])
def test_parameters_are_read_as_in_a_config(text: str) -> None:
    assert read_params("top_k", text) == {"k": 3}
    assert read_params("unspool_sample.top_k:TopK", text) == {"k": 3}


def test_parameters_of_a_class_of_transformers_have_names() -> None:
    assert read_params("transformers:TopKLogitsWarper", "top_k=3") == {"top_k": 3}


def test_laws_complete() -> None:
    assert "batch_invariance" in dict(law_names("batch"))
    assert law_names("no_such") == []


@pytest.mark.slow
def test_a_class_in_the_folder_at_hand_is_checked_with_real_laws(tmp_path: Path) -> None:
    (tmp_path / "crowd.py").write_text(
        '''
import torch
from unspool import Growth, Plugin, hookimpl

class Crowd(Plugin):
    """Choose by how many others there are, which no plugin may."""

    row_local = True

    @hookimpl
    def select(self, step, logits):
        token = (logits.argmax(-1) + len(logits) - 1) % logits.shape[-1]
        return Growth(row=torch.arange(len(logits)), token=token)
''',
        encoding="utf-8",
    )
    laws = ["--law", "batch_invariance", "--law", "config_round_trip"]
    command = [sys.executable, "-m", "unspool", "check", "crowd:Crowd", "--json", *laws]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert [law["status"] for law in json.loads(done.stdout)["laws"]] == ["broken", "held"]
