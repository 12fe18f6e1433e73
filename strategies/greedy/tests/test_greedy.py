"""Greedy decoding chooses the largest logit, the lowest id of equal ones."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unspool.pipeline import Pipeline
from unspool_greedy import Greedy


def greedy() -> Greedy:
    plugin = Greedy(Greedy.Params())
    plugin.name = "greedy"
    return plugin


def choose(logits: torch.Tensor) -> list[int]:
    growth = greedy().select(cast(Any, None), logits)
    assert growth.row.tolist() == list(range(len(logits)))
    assert growth.score is None and growth.stream is None
    return cast(list[int], growth.token.tolist())


@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_lowest_id_of_the_largest_logits_is_chosen(rows: list[list[int]]) -> None:
    assert choose(torch.tensor(rows, dtype=torch.float32)) == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forbidden_tokens_are_not_chosen(dtype: torch.dtype) -> None:
    inf = float("inf")
    assert choose(torch.tensor([[-inf, -inf, -5.0, -inf], [-inf, -7.0, -7.0, -inf]], dtype=dtype)) == [2, 1]


def test_a_vocabulary_of_one_token_has_one_choice() -> None:
    assert choose(torch.zeros(3, 1)) == [0, 0, 0]


def test_logits_are_not_written_to() -> None:
    logits = torch.randn(2, 9)
    before = logits.clone()
    choose(logits)
    assert torch.equal(logits, before)


def test_it_is_a_strategy_that_looks_ahead() -> None:
    pipeline = Pipeline(greedy())
    assert pipeline.row_local and pipeline.looks_ahead and pipeline.independent and not pipeline.scores


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_ties_fall_the_same_way_on_the_accelerator() -> None:
    logits = torch.randint(-3, 3, (64, 50_000)).float()
    assert torch.equal(logits.argmax(-1), logits.cuda().argmax(-1).cpu())
