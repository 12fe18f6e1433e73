"""Groups of beams: the first searches as if it were alone, and the others keep away from it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from unspool.errors import ConfigError, InputError
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.pipeline import Pipeline, PluginSpec, build_plugin
from unspool.registry import Registry
from unspool.request import Hypothesis
from unspool.runner import ModelRunner
from unspool_beam.beam import BeamSearch
from unspool_beam.diverse import DiverseBeamSearch
from unspool_testing.driver import alone, plugin, request
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

GROUPS = 3


@cache
def models() -> list[ModelRunner]:
    return [*(TableModel(6, seed=seed) for seed in range(3)), HuggingFaceRunner(tiny_model("llama"))]


def search(model: ModelRunner, strategy: Any, n: int, **limits: Any) -> list[Hypothesis]:
    asked = request(Pipeline(strategy), (2, 3), max_new_tokens=6, n=n, logprobs="pipeline", **limits)
    return list(alone(model, [asked])[0].hypotheses)


def diverse(**params: Any) -> Any:
    return plugin(DiverseBeamSearch, **{"width": 6, "groups": GROUPS, **params})


def group(texts: list[Hypothesis], number: int) -> list[tuple[Any, Any]]:
    return [(h.token_ids, pytest.approx(h.score)) for h in texts if h.stream % GROUPS == number]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_without_diversity_all_groups_are_plain_beam_search(early_stopping: Any) -> None:
    for model in models():
        plain = search(model, plugin(BeamSearch, width=2, early_stopping=early_stopping), 2)
        texts = search(model, diverse(diversity=0, early_stopping=early_stopping), 6)
        for number in range(GROUPS):
            assert group(texts, number) == [(h.token_ids, h.score) for h in plain]


def test_the_first_group_does_not_know_how_much_diversity_is_asked_for() -> None:
    for model in models():
        firsts = [group(search(model, diverse(diversity=value), 6), 0) for value in (0, 0.3, 2, 50)]
        assert all(first == firsts[0] for first in firsts)
        others = [group(search(model, diverse(diversity=value), 6), 1) for value in (0, 50)]
        assert others[0] != others[1]


@pytest.mark.parametrize("penalized", [True, False])
def test_one_group_is_plain_beam_search(penalized: bool) -> None:
    for model in models():
        one = search(model, diverse(width=4, groups=1, diversity=3, penalized_scores=penalized), 4)
        plain = search(model, plugin(BeamSearch, width=4), 4)
        assert [(h.token_ids, h.score) for h in one] == [(h.token_ids, h.score) for h in plain]


def test_with_much_diversity_no_two_groups_begin_alike() -> None:
    for model in models():
        texts = search(model, diverse(width=3, diversity=1e3), 3, end_ids=())
        assert len({h.token_ids[0] for h in texts}) == 3


def test_the_best_of_each_group_comes_before_the_second_of_any() -> None:
    texts = search(models()[0], diverse(diversity=1.0), 6)
    assert {h.stream % GROUPS for h in texts[:GROUPS]} == set(range(GROUPS))


def test_scores_say_how_likely_texts_are_unless_penalties_are_asked_for() -> None:
    for model in models():
        for hypothesis in search(model, diverse(diversity=2.0, length_penalty=0), 6):
            assert hypothesis.score == pytest.approx(sum(hypothesis.logprobs or ()))
        penalized = search(model, diverse(diversity=2.0, length_penalty=0, penalized_scores=True), 6)
        lacking = [sum(h.logprobs or ()) - (h.score or 0) for h in penalized]
        assert any(value > 1 for value in lacking)
        assert all(value / 2 == pytest.approx(round(value / 2), abs=1e-9) for value in lacking), "whole penalties"


def test_groups_that_do_not_divide_the_width_are_refused() -> None:
    registry = Registry([]).with_plugins({"diverse_beam": DiverseBeamSearch})
    with pytest.raises(ConfigError, match="groups must divide width: 3 groups of 4 beams"):
        build_plugin(PluginSpec("diverse_beam", {"width": 4, "groups": 3}), registry)
    with pytest.raises(InputError, match="at most the width of the beam, 3"):
        search(models()[0], diverse(width=3), 4)
