"""`unspool new`: what it writes installs, passes its own tests, can be named in a config, and reads like our own."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unspool.cli import app
from unspool_testing.scaffold import Kind, distribution

ROOT = Path(__file__).parents[3]
NAMES = {
    Kind.strategy: "coin",
    Kind.transform: "top_a",
    Kind.drafter: "echo",
    Kind.constraint: "no_doubles",
    Kind.stop: "no_loops",
}
CONFIGS = {
    "coin": "strategy: {coin: 0.5}",
    "top_a": "strategy: sample\nplugins: [{top_a: 0.9}]",
    "echo": "strategy: greedy\nplugins: [{echo: {n: 1, longest: 4}}]",
    "no_doubles": "strategy: sample\nplugins: [{no_doubles: 1}]",
    "no_loops": "strategy: greedy\nplugins: [{no_loops: {times: 2}}]",
}


def new(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["new", *map(str, arguments)])


def folder(name: str) -> str:
    return f"unspool-{name.replace('_', '-')}"


def run(command: list[object], cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one distribution of each kind."""
    into = tmp_path_factory.mktemp("written")
    for kind, name in NAMES.items():
        result = new(kind, name, "--into", into)
        assert result.exit_code == 0, result.stderr
    return into


def test_it_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    result = new("strategy", "my_idea", "--into", tmp_path)
    assert result.exit_code == 0
    made = tmp_path / "unspool-my-idea"
    files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "pyproject.toml",
        "tests/test_my_idea.py",
        "unspool_my_idea/__init__.py",
        "unspool_my_idea/claims.py",
        "unspool_my_idea/py.typed",
    ]
    said = [line.strip() for line in result.stdout.splitlines()]
    assert set(files) < set(said)
    assert said[-5:] == [
        f"cd {made}",
        "pip install -e .",
        "pytest",
        "unspool check my_idea",
        'unspool generate "Name a bird." -s my_idea',
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("myIdea", "lower-case letters, digits and single underscores, a letter first, such as my_idea"),
        ("my-idea", "such as my_idea"),
        ("2nd", "a letter first, such as nd"),
        ("a__b", "single underscores"),
        ("---x", "No such option"),
        ("off", "YAML would read it as False"),
        ("testing", "a module unspool_testing is installed already"),
        ("top_k", "unspool-sample has a plugin of this name"),
        ("growth", "its class would be Growth, which the module uses already"),
        ("none", "its class would be None"),
    ],
)
def test_a_name_that_would_not_work_is_refused_with_the_reason(name: str, message: str, tmp_path: Path) -> None:
    result = new("strategy", name, "--into", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    assert new("stop", "enough", "--into", tmp_path).exit_code == 0
    readme = tmp_path / "unspool-enough" / "README.md"
    readme.write_text("mine")
    again = new("drafter", "enough", "--into", tmp_path)
    assert again.exit_code == 2
    assert "is there already, and nothing is overwritten" in again.stderr
    assert readme.read_text() == "mine"


def test_a_kind_or_a_folder_that_is_not_there_is_wrong_input(tmp_path: Path) -> None:
    assert new("beam", "wide", "--into", tmp_path).exit_code == 2
    missing = new("stop", "wide", "--into", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "no such folder" in missing.stderr


def test_a_folder_that_cannot_be_written_is_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(Path, "write_text", full)
    result = new("stop", "wide", "--into", tmp_path)
    assert result.exit_code == 3
    assert "cannot write README.md: No space left on device" in result.stderr


@pytest.mark.parametrize("kind", Kind)
def test_nothing_is_left_for_the_author_to_fill_in_before_it_runs(kind: Kind) -> None:
    for path, text in distribution(kind, "my_idea").items():
        assert "$" not in text.replace("$ ", ""), path
        assert "TODO" not in text


def test_what_is_written_keeps_the_style_of_this_project(written: Path) -> None:
    # To an author's linter only the author's own module is first-party; a claim may leave arguments unused.
    options = ["--config", ROOT / "pyproject.toml", "--config", "lint.isort.known-first-party=[]", "--no-cache"]
    for name in NAMES.values():
        ruff = [sys.executable, "-m", "ruff"]
        run([*ruff, "check", *options, "--ignore", "ARG004", "."], written / folder(name))
        run([*ruff, "format", "--check", *options, "."], written / folder(name))


@pytest.mark.slow
def test_what_is_written_is_typed(written: Path) -> None:
    packages = [written / folder(name) / part for name in NAMES.values() for part in (f"unspool_{name}", "tests")]
    run([sys.executable, "-m", "mypy", *packages], ROOT)  # with this project's settings, and its cache where it is warm


@pytest.mark.slow
def test_what_is_written_installs_keeps_the_laws_and_is_used_by_name(written: Path) -> None:
    environment = written / "environment"
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "venv", "--without-pip", environment], written)
    # What is installed here is seen there, editable distributions as well; nothing is downloaded.
    here = sysconfig.get_path("purelib")
    there = sysconfig.get_path("purelib", "venv", {"base": str(environment)})
    Path(there, "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
    folders = [written / folder(name) for name in NAMES.values()]
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet", "install"]
    run([*pip, "--no-deps", "--no-index", "--no-build-isolation", *folders], written)

    tests = run([python, "-m", "pytest", "-q", "-n", "2", "--unspool-examples", "1", *folders], written)
    assert "failed" not in tests and "passed" in tests

    for name, config in CONFIGS.items():
        (written / f"{name}.yaml").write_text(f"{config}\nlimits: {{max_new_tokens: 12}}\n", encoding="utf-8")
    use = (
        "import sys, unspool; from unspool_testing.table import TableModel\n"
        "for name in sys.argv[1:]:\n"
        "    with unspool.Engine(TableModel(6, seed=1), config=f'{name}.yaml') as engine:\n"
        "        print(name, engine.generate([1, 2], seed=1).hypotheses[0].finish_reason)\n"
    )
    assert [line.split()[0] for line in run([python, "-c", use, *CONFIGS], written).splitlines()] == [*CONFIGS]

    checked = run([python, "-m", "unspool", "check", "coin", "--examples", "1", "--json"], written)
    laws = {law["law"]: law["status"] for law in json.loads(checked)["laws"]}
    assert laws["batch_invariance"] == "held"
