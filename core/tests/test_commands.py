"""Commands of other distributions: found, quick, and alone in their failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unspool.cli import app
from unspool.cli.commands import GROUP

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with a module and commands on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution: str, source: str, **commands: str) -> None:
        module = distribution.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in commands.items()]
        (information / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))

    return make


def unspool(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


HELLO = '''
import typer

def names(incomplete: str) -> list[str]:
    return [name for name in ("beam", "bear", "greedy") if name.startswith(incomplete)]

def hello(name: str = typer.Argument(autocompletion=names)) -> None:
    """Greet somebody."""
    typer.echo(f"hello {name}")

app = typer.Typer(help="Greet many.")

@app.command()
def twice(name: str) -> None:
    """Greet twice."""
    typer.echo(f"{name} {name}")

nothing = 3
'''


def test_a_function_becomes_a_command(install: Install) -> None:
    install("greeting", HELLO, hello="greeting:hello")
    assert "Greet somebody." in unspool("--help").stdout
    assert unspool("hello", "you").stdout == "hello you\n"
    assert "Greet somebody." in unspool("hello", "-h").stdout


def test_an_app_becomes_a_command_with_commands_even_with_one(install: Install) -> None:
    install("greeting", HELLO, greet="greeting:app")
    assert "Greet many." in unspool("--help").stdout
    assert unspool("greet", "twice", "you").stdout == "you you\n"


def test_its_options_and_its_name_complete_in_the_shell(install: Install, tmp_path: Path) -> None:
    install("greeting", HELLO, hello="greeting:hello")

    def complete(words: str) -> list[str]:
        asked = {"_UNSPOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "import sys; sys.argv[0] = 'unspool'; from unspool.cli import main; main()"
        environment = os.environ | asked | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        return done.stdout.decode().split()

    assert complete("unspool hel") == ["hello"]
    assert complete("unspool hello bea") == ["beam", "bear"]


def test_one_that_cannot_be_imported_is_listed_as_broken_and_hurts_nobody(install: Install) -> None:
    install("greeting", HELLO, hello="greeting:hello")
    install("sad", "import a_module_that_nobody_has\n", mope="sad:mope", sulk="greeting:absent", lie="greeting:nothing")
    listed = " ".join(unspool("--help").stdout.replace("│", " ").split())
    assert "mope Broken: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in listed
    assert "sulk Broken: AttributeError" in listed
    assert "lie Broken: TypeError: greeting:nothing is neither a function nor a typer.Typer" in listed
    assert unspool("hello", "you").stdout == "hello you\n"
    called = unspool("mope", "--loudly", "x")
    assert called.exit_code == 2
    assert called.stderr.startswith("error: command 'mope' is broken: ModuleNotFoundError")
    assert "Traceback" not in called.stderr
    assert "in <module>" in unspool("mope", "--debug").stderr


def test_only_the_command_that_is_called_is_imported(install: Install) -> None:
    install("greeting", HELLO, hello="greeting:hello")
    install("noisy", "raise SystemExit('imported')\n", shout="noisy:shout")
    assert unspool("hello", "you").stdout == "hello you\n"
    assert unspool("plugins", "--help").exit_code == 0
    assert "noisy" not in sys.modules


def test_two_distributions_with_one_name_are_both_named(install: Install) -> None:
    install("greeting", HELLO, hello="greeting:hello")
    install("welcome", HELLO, hello="welcome:hello")
    called = unspool("hello", "you")
    assert called.exit_code == 2
    assert "greeting and welcome register it: uninstall one of them" in called.stderr


def test_a_name_of_the_core_stays_the_cores(install: Install) -> None:
    install("greeting", HELLO, plugins="greeting:hello")
    assert "hello" not in unspool("plugins", "you").stdout
    assert unspool("--help").stdout.count(" plugins ") == 1


def test_a_misspelt_command_hears_what_was_meant(install: Install) -> None:
    install("greeting", HELLO, hello="greeting:hello")
    assert "Did you mean 'hello'?" in unspool("helo", "you").stderr


@pytest.mark.parametrize("name", ["check", "new"])
def test_a_command_that_is_not_installed_says_where_it_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.cli.commands._points", dict)
    called = unspool(name, "beam")
    assert called.exit_code == 2
    assert "it comes with unspool-testing" in " ".join(called.stderr.replace("│", " ").split())
