"""A plugin from elsewhere: found by its entry point, named in a config, and alone in its failure."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unspool
from unspool.errors import PluginError
from unspool.hooks import Growth
from unspool.plugin import Plugin, hookimpl
from unspool.registry import Registry
from unspool.step import Step
from unspool_testing.table import TableModel

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-plugin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example into a folder of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder), str(EXAMPLE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def runner_up(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Plugin]]:
    """Put that folder on the path."""
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.delitem(sys.modules, "unspool_runner_up", raising=False)
    module = importlib.import_module("unspool_runner_up")
    assert Path(str(module.__file__)).is_relative_to(elsewhere)
    plugin: type[Plugin] = module.RunnerUp
    yield plugin
    sys.modules.pop("unspool_runner_up", None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("strategy: {runner_up: {every: 3}}\nlimits: {max_new_tokens: 12}\n", encoding="utf-8")
    return path


def prompts(count: int) -> list[list[int]]:
    return [[1, 2, 3 + number] for number in range(count)]


def run(config: Path | None, requests: list[unspool.Request]) -> list[unspool.Result]:
    with unspool.Engine(TableModel(12, seed=3), config=config, registry=Registry.installed()) as engine:
        return list(engine.run(requests, ordered=True))


@pytest.mark.usefixtures("runner_up")
def test_it_is_found_by_its_entry_point() -> None:
    entry = Registry.installed().find("runner_up")
    assert (entry.distribution, entry.version, entry.is_strategy) == ("unspool-runner-up", "0.1.0", True)


@pytest.mark.usefixtures("runner_up")
def test_a_config_uses_it_by_name(config: Path) -> None:
    [result] = run(config, [unspool.Request(prompt=[1, 2, 3])])
    model = TableModel(12, seed=3)
    path: tuple[int, ...] = (1, 2, 3)
    for number in range(1, 13):
        best = model.logits_after(path).topk(2).indices.tolist()
        path = (*path, best[1] if number % 3 == 0 else best[0])
    assert result.token_ids == path[3:]


@pytest.mark.usefixtures("runner_up")
def test_each_request_has_its_own_parameter_in_one_batch(config: Path) -> None:
    requests = [unspool.Request(prompt=[1, 2, 3], strategy=f"runner_up:{every}") for every in (2, 3, 5)]
    together = [result.token_ids for result in run(config, requests)]
    assert together == [run(config, [request])[0].token_ids for request in requests]
    assert len(set(together)) == 3


def fail(plugin: type[Plugin], monkeypatch: pytest.MonkeyPatch, prompt: list[int] | None = None) -> None:
    """Make the plugin raise at its fifth step, for every request or for the one with that prompt."""
    chosen: Any = plugin.select  # type: ignore[attr-defined]

    @hookimpl
    def select(self: Plugin, step: Step, logits: torch.Tensor) -> Growth:
        fifth = [step.requests[i] for i in step.request[step.length == 4].tolist()]
        if any(prompt is None or list(request.prompt_ids) == prompt for request in fifth):
            raise RuntimeError("the fifth step is too much")
        grown: Growth = chosen(self, step, logits)
        return grown

    monkeypatch.setattr(plugin, "select", select)


def test_when_it_raises_at_step_5_its_own_requests_fail_and_no_others(
    runner_up: type[Plugin], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        unspool.Request(prompt=prompt, strategy=strategy, seed=7)
        for prompt in prompts(3)
        for strategy in ("greedy", "runner_up", "sample")
    ]
    expected = run(config, requests)
    assert not [result.error for result in expected if result.error]
    fail(runner_up, monkeypatch)
    for request, before, after in zip(requests, expected, run(config, requests), strict=True):
        if request.strategy == "runner_up":
            assert isinstance(after.error, PluginError)
            assert (after.error.plugin, after.error.hook) == ("runner_up", "select")
            assert "the fifth step is too much" in str(after.error)
            assert after.stats.forward_passes == 5
        else:
            assert after.error is None
            assert after.token_ids == before.token_ids


def test_when_it_raises_for_one_request_the_others_of_its_group_go_on(
    runner_up: type[Plugin], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [unspool.Request(prompt=prompt) for prompt in prompts(5)]
    expected = run(config, requests)
    fail(runner_up, monkeypatch, prompt=prompts(5)[2])
    results = run(config, requests)
    assert [type(result.error) for result in results] == [type(None)] * 2 + [PluginError] + [type(None)] * 2
    assert [r.token_ids for r in results if not r.error] == [r.token_ids for i, r in enumerate(expected) if i != 2]


def test_one_that_cannot_be_imported_is_listed_as_broken_and_hurts_nobody(
    elsewhere: Path, runner_up: type[Plugin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [there] = elsewhere.glob("*.dist-info")
    copy = tmp_path / there.name
    copy.mkdir()
    for file in there.iterdir():
        if file.is_file():
            copy.joinpath(file.name).write_bytes(file.read_bytes())
    tmp_path.joinpath("unspool_runner_up.py").write_text("import a_module_that_nobody_has\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "unspool_runner_up")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry.installed()
    [entry] = [entry for entry in registry if entry.name == "runner_up"]
    assert "a_module_that_nobody_has" in str(entry.broken)
    with unspool.Engine(TableModel(12), registry=registry) as engine:
        assert engine.generate([1, 2], strategy="greedy", max_new_tokens=3).token_ids
        with pytest.raises(unspool.UnspoolError, match="broken"):
            engine.generate([1, 2], strategy="runner_up", max_new_tokens=3)


@pytest.mark.real_model
def test_the_command_line_uses_it_with_a_real_model(elsewhere: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {name: smollm2, dtype: float32}\nstrategy: {runner_up: 4}\nengine: {slots: 512}\n", encoding="utf-8"
    )

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from unspool.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(elsewhere)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "unspool-runner-up 0.1.0" in call("plugins", "runner_up")
    assert call("generate", "Name a bird.", "-c", str(config), "--max-new-tokens", "8").strip()
