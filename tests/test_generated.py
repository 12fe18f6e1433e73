"""What is generated is current, and complete."""

from __future__ import annotations

import json
from pathlib import Path

import generate

from unspool.pipeline import HOOKS
from unspool.plugin import Plugin
from unspool.step import Step

ROOT = Path(__file__).parents[1]


def test_every_generated_file_is_current() -> None:
    stale = generate.out_of_date()
    assert not stale, "run `make docs`:\n" + "\n".join(stale.values())


def test_the_hook_reference_names_all_that_a_plugin_meets() -> None:
    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    for hook in HOOKS:
        assert f"### `{hook}(" in page
    members = [name for name in vars(Step) if not name.startswith("_") and name != "calls_for"]
    for name in members:
        assert f"step.{name}" in page
    for name in vars(Plugin):
        if not name.startswith("_") and name != "Params":
            assert f"`{name}" in page, name


def test_every_plugin_and_parameter_stands_in_the_tables() -> None:
    page = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    schema = json.loads((ROOT / "docs/config-schema.json").read_text(encoding="utf-8"))
    for entry in generate.workspace():
        assert f"### `{entry.name}`" in page
        assert f"| `{entry.name}` |" in readme
        assert f"{entry.name}.params" in schema["$defs"]
        for name, field in entry.plugin.Params.model_fields.items():
            assert f"`{name}`" in page
            assert field.description, f"{entry.name}.{name} is not described"
