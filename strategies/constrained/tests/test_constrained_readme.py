"""The constrained distribution: what it registers, and what its README says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from unspool.config import Config
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.registry import Registry
from unspool_constrained import schema_limits, within
from unspool_constrained.completion import LONGEST
from unspool_constrained.guidance import KEPT
from unspool_constrained.guidance_position import REMEMBERED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def registered() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)["project"]["entry-points"]["unspool"])


def test_the_readme_names_every_plugin_and_parameter_with_its_default() -> None:
    assert len(registered()) == 6
    for name in registered():
        entry = Registry.installed().find(name)
        assert f"`{entry.name}`" in README
        for field, info in entry.plugin.Params.model_fields.items():
            default = "required" if info.is_required() else str(info.default)
            row = rf"^\| (\*\*)?`{field}`(\*\*)? \| `?{re.escape(default)}`? \|"
            assert re.search(row, README, re.MULTILINE), (name, field)


def test_the_snippets_of_the_readme_make_pipelines() -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 7
    for snippet in snippets:
        config = Config.parse(yaml.safe_load(snippet), Registry.installed())
        assert config.strategy is not None
        plugins = [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)]
        build_pipeline(config.strategy, plugins, Registry.installed())


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
