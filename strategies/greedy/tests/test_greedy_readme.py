"""The greedy distribution: what it registers, and what its README says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from unspool.config import Config
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.registry import Entry, Registry

ROOT = Path(__file__).parents[1]


def registered() -> Registry:
    """Know the plugins that the distribution registers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["unspool"]
    return Registry([Entry(name, target) for name, target in points.items()])


def test_the_readme_names_every_plugin_and_parameter() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in registered():
        assert entry.broken is None
        for word in (entry.name, *entry.plugin.Params.model_fields):
            assert f"{word}" in readme, f"{entry.name}: {word}"


def test_the_snippets_of_the_readme_make_pipelines() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    registry = registered()
    snippets = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert snippets
    for snippet in snippets:
        config = Config.parse(yaml.safe_load(snippet), registry)
        assert config.strategy is not None
        build_pipeline(
            config.strategy, [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)], registry
        )
