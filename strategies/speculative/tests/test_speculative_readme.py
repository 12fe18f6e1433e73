"""The speculative distribution: what it registers, and what its README says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from unspool.config import Config
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.registry import Registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def registered() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)["project"]["entry-points"]["unspool"])


def test_the_readme_names_every_plugin_and_parameter() -> None:
    for name in registered():
        entry = Registry.installed().find(name)
        for word in (entry.name, *entry.plugin.Params.model_fields):
            assert f"`{word}`" in README, f"{entry.name}: {word}"


def test_the_readme_gives_every_default() -> None:
    for name in registered():
        for field, info in Registry.installed().find(name).plugin.Params.model_fields.items():
            default = "required" if info.is_required() else "none" if info.default is None else str(info.default)
            assert re.search(rf"^\| (\*\*)?`{field}`(\*\*)? \| `?{re.escape(default)}`? \|", README, re.MULTILINE), (
                field
            )


def test_the_snippets_of_the_readme_make_pipelines() -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 5
    for snippet in snippets:
        config = Config.parse(yaml.safe_load(snippet), Registry.installed())
        assert config.strategy is not None
        plugins = [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)]
        build_pipeline(config.strategy, plugins, Registry.installed())
