"""The watermark distribution: what it registers, and what its README says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from unspool.config import Config
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.registry import Entry, Registry
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def registered() -> Registry:
    """Know the plugins that the distribution registers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["unspool"]
    return Registry([Entry(name, target) for name, target in points.items()])


def test_the_readme_names_every_plugin_and_parameter() -> None:
    for entry in registered():
        assert entry.broken is None
        for word in (entry.name, *entry.plugin.Params.model_fields):
            assert f"`{word}`" in README, f"{entry.name}: {word}"


@pytest.mark.parametrize("name", ["green_list", "tournament"])
def test_the_table_has_the_defaults(name: str) -> None:
    [[_, table]] = [part for part in re.findall(r"## `(\w+)`\n(.*?)(?=\n## |\Z)", README, re.DOTALL) if part[0] == name]
    rows = dict(re.findall(r"^\| \**`(\w+)`\** \| (\S+) \|", table, re.MULTILINE))
    fields: Any = registered().find(name).plugin.Params.model_fields
    assert list(rows) == list(fields)
    for field, default in rows.items():
        shown = "required" if fields[field].is_required() else yaml.safe_dump(fields[field].default).split("\n")[0]
        assert default.strip("`") == shown


def test_the_snippets_of_the_readme_make_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "watermark.key").write_text("secret", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    registry = registered().with_plugins({"sample": Sample, "temperature": Temperature, "top_k": TopK})
    snippets = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        config = Config.parse(yaml.safe_load(snippet), registry)
        assert config.strategy is not None
        build_pipeline(
            config.strategy, [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)], registry
        )
