"""Law 10: a pipeline written as a config and read again is the same pipeline, and gives the same text."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters

from unspool.config import Config, read_config, validate
from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.registry import Registry
from unspool.request import Request
from unspool.resolved import Defaults, describe, resolve_request
from unspool_greedy import Greedy
from unspool_testing.compare import check_equal, with_plugin
from unspool_testing.driver import alone, plugin, request
from unspool_testing.hosts import Bias, NarrowSearch
from unspool_testing.table import TableModel

VOCAB = 5
MADE = {name: make() for name, make in PIPELINES.items()}
MADE |= {f"sample, {name}": with_plugin(MADE["sample"], make(1)) for name, make in drafters(VOCAB).items()}
REGISTRY = Registry([]).with_plugins({p.name: type(p) for pipeline in MADE.values() for p in pipeline.plugins})
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}


def read_again(pipeline: Pipeline) -> Pipeline:
    config = validate(Config, yaml.safe_load(yaml.safe_dump(describe(pipeline))), REGISTRY)
    return resolve_request(Defaults(config, REGISTRY), Request(prompt=[1])).pipeline


@pytest.mark.parametrize("name", MADE)
def test_a_pipeline_that_is_written_and_read_again_is_the_same(name: str) -> None:
    before = MADE[name]
    after = read_again(before)
    assert describe(after) == describe(before)
    assert after.key == before.key
    one, other = (alone(TableModel(VOCAB), [request(p, (1, 2), seed=3, n=2)], MODELS)[0] for p in (before, after))
    check_equal(one, other)


@settings(max_examples=50, deadline=None)
@given(
    children=st.integers(1, 9),
    width=st.integers(1, 9),
    enough=st.integers(0, 9),
    token=st.integers(0, VOCAB - 1),
    bias=st.floats(-1e6, 1e6),
)
def test_every_parameter_survives(children: int, width: int, enough: int, token: int, bias: float) -> None:
    search = plugin(NarrowSearch, children=children, width=width, enough=enough)
    before = Pipeline(search, [plugin(Bias, token=token, bias=bias)])
    after = read_again(before)
    assert after.parameters == before.parameters


def test_a_file_in_yaml_and_one_in_toml_make_the_same_pipeline(tmp_path: Path) -> None:
    toml = 'strategy = "greedy"\n[[plugins]]\nbias = {token = 2, bias = 0.5}\n[limits]\nmax_new_tokens = 7\n'
    (tmp_path / "a.toml").write_text(toml)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tomllib.loads(toml)))
    one, other = (read_config(tmp_path / name, REGISTRY) for name in ("a.toml", "a.yaml"))
    assert one == other
    resolved = resolve_request(Defaults(one, REGISTRY), Request(prompt=[1]))
    assert resolved.limits(1).max_new_tokens == 7
    assert describe(resolved.pipeline) == {"strategy": "greedy", "plugins": [{"bias": {"token": 2, "bias": 0.5}}]}


def test_requests_with_different_values_of_a_request_share_a_group_and_keep_their_own() -> None:
    defaults = Defaults(validate(Config, {"strategy": "greedy"}, REGISTRY), REGISTRY)
    asked = [Request(prompt=[1], plugins=[{"bias": {"token": token, "bias": 50.0}}]) for token in (2, 3)]
    resolved = [resolve_request(defaults, one) for one in asked]
    assert resolved[0].pipeline.key == resolved[1].pipeline.key
    prepared = [request(r.pipeline, (1,), max_new_tokens=2, parameters=r.parameters) for r in resolved]
    assert [r.token_ids for r in alone(TableModel(VOCAB), prepared)] == [(2, 2), (3, 3)]


def test_two_strategies_and_doubled_plugins_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="a pipeline has one"):
        Pipeline(plugin(Greedy), [plugin(NarrowSearch)])
    with pytest.raises(ConfigError, match="stands twice"):
        Pipeline(plugin(Greedy), [plugin(Bias), plugin(Bias)])
    with pytest.raises(ConfigError, match="it does not implement select"):
        Pipeline(plugin(Bias))
