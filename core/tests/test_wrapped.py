"""Hugging Face processors and criteria act on each row's own path."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf
from transformers.generation import stopping_criteria as criteria

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.wrapped import wrap_criteria, wrap_processor

PATHS = [[1, 2, 1], [3], [2, 2, 0], [4, 1, 4, 1]]


class Strategy(Plugin):
    name = "strategy"
    row_local = True

    @hookimpl
    def select(self, step: Any, logits: Tensor) -> Growth:
        raise AssertionError("never called here")


def strategy() -> Strategy:
    return Strategy(Strategy.Params())


def padded() -> tuple[Tensor, Tensor]:
    longest = max(map(len, PATHS))
    ids = torch.tensor([path + [0] * (longest - len(path)) for path in PATHS])
    return ids, torch.tensor([len(path) for path in PATHS])


def transform(plugin: Plugin, logits: Tensor) -> None:
    cast(Any, plugin).logits_transform(SimpleNamespace(paths=padded), logits)


@pytest.mark.parametrize("processor", [hf.RepetitionPenaltyLogitsProcessor(1.4), hf.NoRepeatNGramLogitsProcessor(2)])
def test_each_row_is_shown_its_own_path_without_padding(processor: Any) -> None:
    logits = torch.randn(4, 6)
    pairs = zip(PATHS, logits, strict=True)
    expected = torch.cat([processor(torch.tensor([path]), row.unsqueeze(0).clone()) for path, row in pairs])
    transform(wrap_processor(processor), logits)
    torch.testing.assert_close(logits, expected)


def test_rows_of_one_length_come_in_one_call() -> None:
    shapes = []

    def spy(input_ids: Tensor, scores: Tensor) -> Tensor:
        shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return scores * 2

    logits = torch.ones(4, 6)
    transform(wrap_processor(spy, pure=True), logits)
    assert shapes == [((1, 1), (1, 6)), ((2, 3), (2, 6)), ((1, 4), (1, 6))]
    assert (logits == 2).all()


def test_what_may_keep_state_is_refused_unless_declared_pure() -> None:
    class Counting(hf.LogitsProcessor):
        pass

    class Subclass(hf.TopKLogitsWarper):
        pass

    for processor in (Counting(), Subclass(3), hf.RepetitionPenaltyLogitsProcessor(1.2, torch.tensor([1, 2]))):
        with pytest.raises(InputError, match="pure=True"):
            wrap_processor(processor)
        assert wrap_processor(processor, pure=True).row_local
    with pytest.raises(InputError, match="wrap each"):
        wrap_processor(cast(Any, hf.LogitsProcessorList([hf.TopKLogitsWarper(3)])), pure=True)


def test_different_objects_never_share_a_group_and_the_same_one_does() -> None:
    one, other = hf.TopKLogitsWarper(3), hf.TopKLogitsWarper(3)
    key = Pipeline(strategy(), [wrap_processor(one)]).key
    assert Pipeline(strategy(), [wrap_processor(one)]).key == key
    assert Pipeline(strategy(), [wrap_processor(other)]).key != key
    assert len(Pipeline(strategy(), [wrap_processor(one), wrap_processor(other)]).plugins) == 3


def test_a_dead_objects_identity_is_not_given_to_another() -> None:
    seen = set()
    for _ in range(20):
        seen.add(wrap_processor(hf.TopKLogitsWarper(3)).name)
        gc.collect()
    assert len(seen) == 20


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        transform(wrap_processor(lambda ids, scores: scores[:, :2], pure=True), torch.ones(4, 6))


def grown(finish: list[str | None]) -> Growth:
    growth = Growth(row=torch.arange(4), token=torch.zeros(4, dtype=torch.int64), finish=finish)
    growth._paths = padded
    return growth


def stop(plugin: Plugin, growth: Growth) -> list[str | None]:
    cast(Any, plugin).stop_check(None, growth)
    return list(growth.finish)


def test_a_criterion_finishes_children_by_their_own_paths() -> None:
    plugin = wrap_criteria(criteria.EosTokenCriteria(eos_token_id=1))
    assert stop(plugin, grown([None] * 4)) == ["stopping_criteria", None, None, "stopping_criteria"]
    assert stop(wrap_criteria(criteria.MaxLengthCriteria(3)), grown([None] * 4)) == [
        "stopping_criteria",
        None,
        "stopping_criteria",
        "stopping_criteria",
    ]


def test_the_first_finish_reason_stands_and_a_plain_bool_is_understood() -> None:
    plugin = wrap_criteria(lambda input_ids, scores: input_ids.shape[1] == 3)
    assert stop(plugin, grown(["eos", None, None, None])) == ["eos", None, "stopping_criteria", None]


def test_criteria_that_read_more_than_the_path_are_refused() -> None:
    with pytest.raises(InputError, match="deadline"):
        wrap_criteria(criteria.MaxTimeCriteria(1.0))
    with pytest.raises(InputError, match="scores"):
        wrap_criteria(cast(Any, criteria.ConfidenceCriteria)(0.4))
    with pytest.raises(InputError, match="wrap each"):
        wrap_criteria(criteria.StoppingCriteriaList([criteria.MaxLengthCriteria(3)]))
