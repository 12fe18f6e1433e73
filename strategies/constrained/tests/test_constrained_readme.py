"""The Python in the README of the constrained distribution runs, and its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from unspool_constrained import schema_limits, within
from unspool_constrained.completion import LONGEST
from unspool_constrained.guidance import KEPT
from unspool_constrained.guidance_position import REMEMBERED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.real_model
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space: dict[str, Any] = {"__name__": "readme"}
    exec(compile(snippet, "README.md", "exec"), space)
    assert re.match(r"name='.*' age=\d+", capsys.readouterr().out)


def test_the_readme_gives_the_numbers_of_the_code() -> None:
    flat = " ".join(README.replace("\u00a0", " ").split())
    for said in (
        f"no more than {within.SLACK} tokens",
        f"the likeliest {within.LIKELIEST}",
        f"more than {LONGEST} tokens",
        f"the last {KEPT} of them",
        f"its last {REMEMBERED} tokens",
        f"{schema_limits.LONGEST:,} characters, {schema_limits.DEEPEST} levels".replace("000,000", "000 000").replace(
            "1,", "1 "
        ),
        f"match together | {schema_limits.MOST_PATTERNS} |",
        f"together | {schema_limits.LARGEST_MULTIPLE:,} |".replace(",", " "),
    ):
        assert said in flat, said
