"""The page 'write and prove a strategy in ten minutes' is true: it is done here as it is written, from its text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "prove.md"
MODULE = "unspool-sure-thing/unspool_sure_thing/__init__.py"
WRITTEN = {
    "python tutorial first": MODULE,
    "python tutorial second": MODULE,
    "python tutorial claims": "unspool-sure-thing/unspool_sure_thing/claims.py",
    "python tutorial tests": "unspool-sure-thing/tests/test_laws.py",
    "yaml tutorial": "config.yaml",
}
"""What stands on a fence -> where the reader is told to put what is in it."""
FEW = ["--examples", "12"]
"""Cases of each law, where the page tries all: this is about the page, `test_conformance.py` about the laws."""


@pytest.mark.slow
@pytest.mark.real_model
def test_the_page_can_be_followed_word_by_word(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for fence, text in re.findall(r"^```(\w+ tutorial.*)\n((?:.*\n)*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE):
        if fence in WRITTEN:
            assert WRITTEN[fence] in PAGE.read_text("utf-8"), "the page says where"
            (tmp_path / WRITTEN[fence]).write_text(text, encoding="utf-8")
        elif fence == "toml tutorial":
            assert text in (tmp_path / "unspool-sure-thing" / "pyproject.toml").read_text("utf-8")
        else:
            for command in text.splitlines():
                reader.type(command.removeprefix("$ "), fails=fence.endswith("fails"))
    assert len(reader.said) == 5
    broken, mended = reader.said["unspool check sure_thing"]
    assert "statelessness" in broken and "check_batch_invariance(" in broken
    assert "broken" not in mended
    assert re.search(r"distribution\s+held", mended)
    assert reader.said['unspool generate "Name a bird." --config config.yaml'][0].strip()


class Reader:
    """Somebody who types what the page says, in an environment of their own that sees what is installed here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, dict[str, list[str]]()
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        there = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
        here = sysconfig.get_path("purelib")
        (there / "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
        self.python = environment / "bin" / "python"

    def type(self, command: str, fails: bool) -> None:
        """Type a command; one of the commands below a fence that `fails` does."""
        tool, _, rest = command.partition(" ")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", "--disable-pip-version-check"]
        arguments = re.findall(r'"([^"]*)"|(\S+)', rest)
        words = [quoted or bare for quoted, bare in arguments]
        if tool == "pip":
            whole = [*pip, *words, "--no-deps", "--no-index", "--no-build-isolation"]
        else:
            whole = [str(self.python), "-m", tool, *words]
            whole += FEW if words[0] == "check" else ["--unspool-examples", "5"] if tool == "pytest" else []
        done = subprocess.run(
            whole, cwd=self.folder, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
        )
        expected = 1 if fails and words[0] == "check" else 0
        assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
        self.said.setdefault(command, []).append(done.stdout)
