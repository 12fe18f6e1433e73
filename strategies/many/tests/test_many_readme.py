"""The many distribution: what it registers, and what its README says."""

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
from unspool_many.functions import find

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def points() -> dict[str, dict[str, str]]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = tomllib.loads(text)["project"]["entry-points"]
    return found


def test_the_readme_names_every_plugin_and_parameter_with_its_default() -> None:
    registry = Registry.installed()
    for name in points()["unspool"]:
        fields = registry.find(name).plugin.Params.model_fields
        section = README.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
        assert set(rows) == set(fields)
        for field, default in rows.items():
            value: Any = fields[field].default
            assert default == ("none" if value is None else f"`{str(value).lower()}`"), f"{name}.{field}"


@pytest.mark.parametrize("group", ["unspool.scorers", "unspool.utilities", "unspool.potentials"])
def test_the_readme_names_every_function_that_is_built_in(group: str) -> None:
    assert f"`{group}`" in README
    for name in points()[group]:
        assert find(group, name).__name__ == name
        assert f"`{name}`" in README


def test_the_snippets_of_the_readme_make_pipelines() -> None:
    registry = Registry.installed()
    snippets = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    named = set()
    for snippet in snippets:
        config = Config.parse(yaml.safe_load(snippet), registry)
        assert config.strategy is not None
        named.add(config.strategy.name)
        build_pipeline(
            config.strategy, [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)], registry
        )
    assert named == set(points()["unspool"])
