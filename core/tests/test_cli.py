"""The command line: exit codes, what is written where, and a run that is killed and resumed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner, Result

from unspool.cli import app
from unspool.cli.failure import reported
from unspool.cli.loading import load_engine
from unspool.engine import Engine
from unspool.errors import DeadEnd, InputError, ModelError, OutputError, PluginError
from unspool.plugin import Plugin, hookimpl
from unspool.registry import Registry
from unspool.resolved import load_defaults
from unspool.runner import Batch, Output

pytestmark = pytest.mark.skipif(
    not {"greedy", "sample", "temperature"} <= {e.name for e in Registry.installed()},
    reason="needs unspool-greedy and unspool-sample",
)
VOCAB = 32


class Bigrams:
    """A model that looks at one token alone, so it needs no cache."""

    vocab_size, window, width, layers, digest = VOCAB, 64, 1, 1, "bigrams"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def slot_bytes(self) -> int:
        return 1

    def free_bytes(self) -> int:
        return 1 << 20

    def allocate(self, slots: int) -> None: ...

    def forward(self, batch: Batch) -> Output:
        return Output(self.table[torch.from_numpy(batch.token_ids[batch.wanted])])

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("works", [True, False])
def test_garbage_is_looked_for_again_once_a_model_is_loaded(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(**_: Any) -> None:
        assert not gc.isenabled()
        if not works:
            raise ModelError("broken")

    monkeypatch.setattr(Engine, "load", loading)
    defaults = load_defaults(None, Registry.installed())
    with nullcontext() if works else pytest.raises(ModelError):
        load_engine(defaults)
    assert gc.isenabled()


@pytest.fixture
def bigrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every command load the same small model."""

    def load(**options: Any) -> Engine:
        return Engine(Bigrams(), config=options["config"], registry=options["registry"], generation={"eos_token_id": 0})

    monkeypatch.setattr(Engine, "load", load)


def unspool(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "unspool", *map(str, arguments)]


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    lines = [{"prompt": [i % VOCAB, 3], "id": f"r{i}", "strategy": "sample"} for i in range(20)]
    return write_lines(tmp_path / "in.jsonl", *lines)


def test_help_and_version_start_without_torch() -> None:
    code = "import sys, unspool.cli; assert not {'torch', 'transformers', 'pydantic'} & sys.modules.keys(), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert unspool("--version").stdout.startswith("unspool 0.")
    assert "chat template" in unspool("generate", "--help").stdout


def test_plugins_are_listed_with_their_distribution_and_broken_ones_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unspool.registry import Entry

    entries = [*Registry.installed(), Entry("lost", "no_such_module:Lost", "lost-dist", "1.0")]
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: cls(entries)))
    listed = unspool("plugins").stdout
    assert "unspool-greedy 0.1.0" in listed
    assert "strategy" in listed
    [line] = [line for line in listed.splitlines() if line.startswith("lost")]
    assert "broken" in line
    assert "No module named 'no_such_module'" in line


def test_one_plugin_is_shown_with_its_parameters() -> None:
    shown = unspool("plugins", "top_p")
    assert "The mass to keep" in shown.stdout
    assert "p (main)" in shown.stdout
    assert "> 0, <= 1" in shown.stdout
    missing = unspool("plugins", "topp")
    assert missing.exit_code == 2
    assert "did you mean 'top_p'" in missing.stderr


def test_config_check_says_all_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("strategy: {greedy: {}, sample: {}}\nplugins: [tempurature, {top_p: 3}]\nsede: 1\n")
    result = unspool("config", "check", path)
    assert result.exit_code == 2
    for word in ("one strategy, not 2", "did you mean 'temperature'", "plugins.top_p.p", "did you mean 'seed'"):
        assert word in result.stderr
    path.write_text("strategy: greedy\nplugins: [{temperature: 0.7}]\n")
    assert unspool("config", "check", path).stdout == f"{path}: ok\n"
    assert unspool("config", "check", tmp_path / "none.yaml").exit_code == 2


def test_config_check_refuses_a_second_strategy_among_the_plugins(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("strategy: greedy\nplugins: [sample]\n")
    result = unspool("config", "check", path)
    assert result.exit_code == 2
    assert "a pipeline has one" in result.stderr


def test_config_show_says_where_every_value_comes_from(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(json.dumps(generation))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {model}\nplugins: [{{top_p: 0.5}}]\nprofiles:\n  long: {{limits: {{max_new_tokens: 99}}}}\n"
    )
    shown = unspool("config", "show", "-c", path, "--profile", "long", "-p", "top_k:5", "--json")
    values = {field: (v["value"], v["source"]) for field, v in json.loads(shown.stdout)["values"].items()}
    assert values["plugins.temperature.temperature"] == (0.6, "the model's generation config")
    assert values["plugins.top_p.p"] == (0.5, str(path))
    assert values["plugins.top_k.k"] == (5, "command line")
    assert values["limits.max_new_tokens"] == (99, "profile long")
    assert values["strategy.noise"] == ("gumbel", "default of sample")
    dropped = unspool("config", "show", "-c", path, "-s", "greedy", "--json")
    [note] = json.loads(dropped.stdout)["notes"]
    assert note == "temperature, top_k of the model's generation config left out: greedy (command line) does not sample"
    assert "command line" in unspool("config", "show", "-c", path, "-s", "greedy").stdout


def test_config_schema_is_json_with_every_plugin() -> None:
    schema = json.loads(unspool("config", "schema").stdout)
    assert "top_p.params" in schema["$defs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "gredy"], "did you mean 'greedy'"),
        (["-p", "temprature:1"], "did you mean 'temperature'"),
        (["-p", "top_p:7"], "less than or equal to 1, not 7"),
        (["-s", "greedy", "-p", "sample"], "a pipeline has one"),
        (["-s", "greedy", "-s", "sample"], "a pipeline has one"),
        (["--max-new-tokens", "0"], "greater than or equal to 1"),
        (["--profile", "none"], "no profile 'none'"),
        (["-c", "no/such.yaml"], "cannot be read"),
        (["--dtype", "float12"], "dtype: Input should be"),
        (["--model", "./no/such"], "no/such"),
        (["--system", "S", "--raw"], "chat template"),
        (["--logprobs", "some"], "logprobs"),
        (["--trace", "no/such/trace.jsonl"], "--trace"),
    ],
)
def test_a_wrong_argument_of_generate_is_two_and_no_traceback(arguments: list[str], message: str) -> None:
    result = unspool("generate", "hello", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in unspool("generate", "hello", "-s", "gredy", "--debug").stderr


def test_a_prompt_that_is_empty_or_not_utf8_is_two(bigrams: None) -> None:
    assert unspool("generate", "").exit_code == 2
    assert "at least one character" in unspool("generate", input="\n").stderr
    assert "UTF-8" in unspool("generate", "-", input=b"\xff\xfe").stderr


def test_text_for_a_model_without_a_tokenizer_is_two(bigrams: None) -> None:
    result = unspool("generate", "hello")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the model has no tokenizer" in result.stderr


def test_an_error_that_nobody_expected_is_one_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**options: Any) -> Engine:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Engine, "load", load)
    result = unspool("generate", "hello")
    assert result.exit_code == 1
    assert result.stderr == "error: ZeroDivisionError: oops (--debug shows where)\n"


def test_run_writes_every_result_with_its_seed(bigrams: None, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = unspool("run", requests, "-o", out, "--seed", 5, "--max-new-tokens", 6)
    assert result.exit_code == 0, result.stderr
    found = {record["id"]: record for record in records(out)}
    assert found.keys() == {f"r{i}" for i in range(20)}
    assert {record["provenance"]["run_seed"] for record in found.values()} == {5}
    assert len({record["provenance"]["seed"] for record in found.values()}) == 20
    assert "20 requests, 0 failed" in result.stderr
    again = tmp_path / "again.jsonl"
    alone = write_lines(tmp_path / "one.jsonl", {"prompt": [7, 3], "id": "r7", "strategy": "sample"})
    unspool("run", alone, "-o", again, "--seed", 5, "--max-new-tokens", 6)
    assert records(again)[0]["hypotheses"] == found["r7"]["hypotheses"]


def test_a_line_names_its_own_profile_plugins_and_limits(bigrams: None, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "limits: {max_new_tokens: 9, ignore_eos: true}\nprofiles:\n  short: {limits: {max_new_tokens: 2}}\n"
    )
    lines: list[dict[str, Any]] = [
        {"prompt": [1]},
        {"prompt": [1], "profile": "short"},
        {"prompt": [1], "profile": "short", "max_new_tokens": 3, "plugins": ["temperature:2"], "id": 77},
        {"prompt": [1], "seed": 5, "n": 2, "plugins!": ["top_k:3"], "strategy": {"sample": {"noise": "uniform"}}},
    ]
    out = tmp_path / "out.jsonl"
    assert unspool("run", write_lines(tmp_path / "in.jsonl", *lines), "-o", out, "-c", config).exit_code == 0
    found = {record["id"]: record for record in records(out)}
    assert [len(found[i]["hypotheses"][0]["token_ids"]) for i in ("1", "2", "77", "4")] == [9, 2, 3, 9]
    assert found["4"]["provenance"]["seed"] == 5
    assert len(found["4"]["hypotheses"]) == 2
    assert found["77"]["provenance"]["config"]["plugins"] == [{"temperature": {"temperature": 2.0}}]


def test_a_bad_line_becomes_an_error_record_and_the_others_go_on(bigrams: None, tmp_path: Path) -> None:
    lines = [
        b'{"prompt": [1',
        b'{"prompt": "\xff"}',
        b"[1, 2]",
        {"prompt": [1], "promt": 2},
        {"prompt": [1], "max_new_tokens": "many"},
        {"prompt": [1], "id": [3]},
        {"prompt": [99]},
        {"prompt": []},
        {"prompt": [1] * 70},
        {"prompt": [1], "max_new_tokens": 64},
        {"prompt": [1], "strategy": "gredy"},
        {"prompt": [1], "profile": "none"},
        {},
        {"prompt": [1], "id": "good", "max_new_tokens": 2},
        {"prompt": [2], "id": "good"},
        {"prompt": [1], "seed": -1},
        {"prompt": [1], "plugins": [], "plugins!": []},
        b"   ",
    ]
    out = tmp_path / "out.jsonl"
    result = unspool("run", write_lines(tmp_path / "in.jsonl", *lines), "-o", out)
    assert result.exit_code == 1
    found = records(out)
    errors = {record["id"]: record["error"]["message"] for record in found if "error" in record}
    assert len(found) == 17
    assert [r["id"] for r in found if "hypotheses" in r] == ["good"]
    words = {
        "1": "JSON",
        "2": "UTF-8",
        "3": "a JSON object",
        "4": "did you mean 'prompt'",
        "5": "max_new_tokens",
        "6": "text or a whole number",
        "7": "token ids are 0 to 31",
        "8": "at least one token",
        "9": "window of 64",
        "10": "at most 63",
        "11": "did you mean 'greedy'",
        "12": "no profile",
        "13": "missing",
        "good": "line 14 has the same",
        "16": "seed",
        "17": "exclude each other",
    }
    assert errors.keys() == words.keys()
    for id_, word in words.items():
        assert word in errors[id_], (id_, errors[id_])
    assert all("run_seed" in record["provenance"] for record in found)


def test_results_that_are_there_are_kept_unless_asked_otherwise(bigrams: None, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    refused = unspool("run", requests, "-o", out)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert unspool("run", requests, "-o", out, "--resume").exit_code == 2
    assert unspool("run", requests, "-o", out, "--resume", "--overwrite").exit_code == 2
    assert out.read_text() == "mine\n"
    assert unspool("run", requests, "-o", out, "--overwrite").exit_code == 0
    assert len(records(out)) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "-o", "out.jsonl"], "No such file"),
        (["in.jsonl", "-o", "in.jsonl"], "another file"),
        (["in.jsonl", "-o", "no/out.jsonl"], "a folder that is there"),
        (["in.jsonl", "-o", "."], "this is a folder"),
        (["in.jsonl", "-o", "out.jsonl", "-s", "gredy"], "did you mean 'greedy'"),
        (["in.jsonl", "-o", "out.jsonl", "--model", "./no/such"], "no/such"),
    ],
)
def test_a_wrong_argument_of_run_is_two_and_nothing_is_written(
    requests: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(requests.parent)
    before = requests.read_bytes()
    result = unspool("run", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert [path.name for path in requests.parent.iterdir()] == ["in.jsonl"]
    assert requests.read_bytes() == before


def test_a_resumed_run_loses_and_repeats_nothing(bigrams: None, requests: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    with requests.open("ab") as file:
        file.write(b'{"prompt": \n{"prompt": [1], "id": "r3"}\n')
    assert unspool("run", requests, "-o", whole, "--seed", 9).exit_code == 1
    expected = sorted(json.dumps(untimed(record)) for record in records(whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 13, 21, 22):
        out.write_bytes(b"".join(lines[:kept]) + lines[kept % 22][:40])
        seed = [] if kept else ["--seed", 9]
        result = unspool("run", requests, "-o", out, "--resume", *seed)
        assert result.exit_code == 1, result.stderr
        assert sorted(json.dumps(untimed(record)) for record in records(out)) == expected
        assert f"{22 - kept} requests" in result.stderr
    assert "seed of the run that is resumed" in unspool("run", requests, "-o", out, "--resume", "--seed", 1).stderr


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what depends on the time and on the rest of the batch."""
    return {name: value for name, value in record.items() if name != "stats"}


def test_a_drawn_run_seed_is_taken_up_again(bigrams: None, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    unspool("run", requests, "-o", out)
    before = records(out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:4]))
    unspool("run", requests, "-o", out, "--resume")
    assert sorted(json.dumps(untimed(r)) for r in records(out)) == sorted(json.dumps(untimed(r)) for r in before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_three(bigrams: None, requests: Path) -> None:
    result = unspool("run", requests, "-o", "/dev/full")
    assert result.exit_code == 3
    assert "No space left on device" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_three_and_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command("plugins"), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 3
    assert done.stderr.decode() == "error: cannot write to stdout: No space left on device\n"


def test_a_request_that_fails_is_one_and_one_that_is_wrong_is_two() -> None:
    for error, code in (
        (PluginError("x", "select", "oops"), 1),
        (DeadEnd([1]), 1),
        (InputError("prompt", "", "something"), 2),
        (ModelError("no such model"), 2),
        (OutputError("full"), 3),
    ):
        with pytest.raises(typer.Exit) as caught, reported(debug=False):
            raise error
        assert caught.value.exit_code == code


def test_a_plugin_that_raises_fails_its_own_requests_alone(
    bigrams: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Plugin):
        row_local = True

        @hookimpl
        def logits_transform(self, step: Any, logits: Tensor) -> None:
            raise ValueError("oops")

    registry = Registry.installed().with_plugins({"breaks": Breaks})
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: registry))
    lines = [{"prompt": [1], "id": "good"}, {"prompt": [1], "id": "bad", "plugins": ["breaks"]}]
    out = tmp_path / "out.jsonl"
    assert unspool("run", write_lines(tmp_path / "in.jsonl", *lines), "-o", out).exit_code == 1
    found = {record["id"]: record for record in records(out)}
    assert "hypotheses" in found["good"]
    assert "'breaks' failed in logits_transform" in found["bad"]["error"]["message"]


def test_a_run_stops_where_the_engine_was_closed_and_what_is_left_can_be_resumed(
    requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**options: Any) -> Engine:
        engine = Engine(Bigrams(), config=options["config"], registry=options["registry"])
        engine.close()
        return engine

    monkeypatch.setattr(Engine, "load", load)
    out = tmp_path / "out.jsonl"
    assert unspool("run", requests, "-o", out).exit_code == 1
    assert records(out) == []


@pytest.mark.parametrize(("words", "found"), [("generate -p top_", "top_k"), ("generate -c c.yaml --profile h", "hot")])
def test_the_shell_completes_plugins_and_profiles(tmp_path: Path, words: str, found: str) -> None:
    (tmp_path / "c.yaml").write_text("profiles: {hot: {}, cold: {}}")
    asked = f"unspool {words}"
    environment = {"_UNSPOOL_COMPLETE": "complete_bash", "COMP_WORDS": asked, "COMP_CWORD": str(words.count(" ") + 1)}
    code = "from unspool.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'unspool'; {code}"],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert found in done.stdout.decode().split()
    assert "cold" not in done.stdout.decode()


def test_a_disk_that_fills_leaves_complete_lines(
    bigrams: None, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, room, real = tmp_path / "out.jsonl", [3000], os.write

    def write(descriptor: int, data: Any) -> int:
        if len(data) < 100:
            return real(descriptor, data)
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("unspool.cli.result_file.os.write", write)
    assert unspool("run", requests, "-o", out).exit_code == 3
    assert 0 < len(records(out)) < 20
    monkeypatch.undo()


def test_requests_are_read_from_stdin_and_results_written_to_stdout() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_cli as t; from unspool.engine import Engine\n"
        "Engine.load = lambda **o: Engine(t.Bigrams(), config=o['config'], registry=o['registry'])\n"
        "from unspool.cli import app; app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), "run", "-", "-o", "-", "--max-new-tokens", "2"]
    done = subprocess.run(command, input=b'{"prompt": [1]}\n{"prompt": [2]}\n', capture_output=True, check=True)
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {"1", "2"}
    with Path("/dev/null").open("w") as nowhere:
        closed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=nowhere)
        assert closed.stdin is not None
        assert closed.stdout is not None
        closed.stdout.close()
        closed.stdin.write(b'{"prompt": [1]}\n')
        closed.stdin.close()
        assert closed.wait(timeout=60) == 3


@pytest.mark.real_model
class TestRealModel:
    """The commands on SmolLM2, each in a process of its own where that matters."""

    def test_generate_answers_as_a_chat(self) -> None:
        result = unspool(
            "generate", "What is the capital of France?", "--max-new-tokens", 16, "-s", "greedy", "--stats"
        )
        assert result.exit_code == 0, result.stderr
        assert "Paris" in result.stdout
        assert "forward passes" in result.stderr

    def test_json_and_stream_give_the_same_text_and_raw_leaves_out_the_template(self, tmp_path: Path) -> None:
        arguments = ["generate", "The capital of France is", "--raw", "--max-new-tokens", 8, "-s", "greedy"]
        trace = tmp_path / "trace.jsonl"
        record = json.loads(unspool(*arguments, "--json", "--trace", trace).stdout)
        assert record["prompt"] == "The capital of France is"
        assert unspool(*arguments).stdout == record["hypotheses"][0]["text"] + "\n"
        assert any(json.loads(line)["event"] == "round" for line in trace.read_text().splitlines())

    def test_a_closed_pipe_is_three(self) -> None:
        process = subprocess.Popen(
            command("generate", "Count to one hundred.", "--max-new-tokens", 60),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 3
        assert process.stderr is not None
        error = process.stderr.read().decode()
        assert "Broken pipe" in error
        assert "Traceback" not in error

    @pytest.mark.slow
    def test_a_killed_run_resumes_to_what_it_would_have_been(self, tmp_path: Path) -> None:
        colours = ("red", "blue", "old", "small") * 6
        lines = [{"prompt": f"Name something {c}.", "strategy": "sample"} for c in colours]
        answers = write_lines(tmp_path / "in.jsonl", *lines)
        out = tmp_path / "out.jsonl"
        arguments = ["run", answers, "-o", out, "--seed", 3, "--max-new-tokens", 24, "--dtype", "float32"]
        process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while time.monotonic() < until and (not out.exists() or out.stat().st_size == 0):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = out.read_bytes().count(b"\n")
        assert unspool(*arguments, "--resume").exit_code == 0
        assert sorted(int(record["id"]) for record in records(out)) == list(range(1, 25))
        assert {record["provenance"]["run_seed"] for record in records(out)} == {3}
        assert before <= 24
