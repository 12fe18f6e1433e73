"""READMEs with a table of parameters for each plugin: they name everything, and what they say can be run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from unspool.config import Config
from unspool.pipeline import PluginSpec, build_pipeline
from unspool.registry import Registry

ROOT = Path(__file__).parents[1]
each = pytest.mark.parametrize("folder", ["strategies/constrained", "strategies/contrastive", "strategies/speculative"])


def readme(folder: str) -> str:
    return (ROOT / folder / "README.md").read_text(encoding="utf-8")


def registered(folder: str) -> list[str]:
    text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)["project"]["entry-points"]["unspool"])


@each
def test_it_names_every_plugin_and_parameter_with_its_default(folder: str) -> None:
    for name in registered(folder):
        assert f"`{name}`" in readme(folder)
        for field, info in Registry.installed().find(name).plugin.Params.model_fields.items():
            default = "required" if info.is_required() else "none" if info.default is None else str(info.default)
            row = rf"^\| (\*\*)?`{field}`(\*\*)? \| `?{re.escape(default)}`? \|"
            assert re.search(row, readme(folder), re.MULTILINE), f"{name}.{field}: {default}"


@each
def test_its_snippets_make_pipelines_with_every_plugin(folder: str) -> None:
    shown = set()
    for snippet in re.findall(r"```yaml\n(.*?)```", readme(folder), re.DOTALL):
        config = Config.parse(yaml.safe_load(snippet), Registry.installed())
        assert config.strategy is not None
        plugins = [spec for spec in config.plugins or () if isinstance(spec, PluginSpec)]
        build_pipeline(config.strategy, plugins, Registry.installed())
        shown |= {config.strategy.name, *(spec.name for spec in plugins)}
    assert shown >= set(registered(folder))
