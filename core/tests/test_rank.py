"""The best of each row come in one order, and no more of them are ranked than it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool import rank
from unspool.huggingface import kernel

TABLES = st.lists(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5), min_size=1)


@pytest.fixture(params=["torch", "kernel"], autouse=True)
def side(request: pytest.FixtureRequest) -> Iterator[str]:
    """Rank by plain torch and by the kernel: both must give the same."""
    if request.param == "kernel" and not kernel.available():
        pytest.skip("there is no kernel here")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "torch":
            patched.setattr(rank, "by_kernel", lambda *_: None)
        yield request.param


def either(test: Any) -> Any:
    return settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)(test)


def sorted_by_hand(values: Tensor) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda place: (-row[place], place)) for row in values.tolist()]


@either
@given(TABLES, st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_of_equal_values_the_first_comes_first(table: list[list[float]], count: int, dtype: torch.dtype) -> None:
    values = torch.tensor(table, dtype=dtype)
    by_hand = sorted_by_hand(values)
    assert rank.best(values, count).tolist() == [row[:count] for row in by_hand]
    assert rank.argmax(values).tolist() == [row[0] for row in by_hand]


@either
@given(st.integers(1, 90), st.integers(1, 3), st.integers(0, 5), st.integers(1, 40), st.data())
def test_ties_are_told_apart_wherever_they_end(
    width: int, rows: int, seed: int, kinds: int, data: st.DataObject
) -> None:
    """Within what is looked at first, at its edge, and far beyond it."""
    values = torch.randint(kinds, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    count = data.draw(st.integers(1, width))
    assert rank.best(values, count).tolist() == [row[:count] for row in sorted_by_hand(values)]


@either
@given(st.integers(1, 900), st.integers(1, 3), st.integers(0, 5), st.integers(1, 40))
def test_the_best_are_ranked_until_it_is_enough(width: int, rows: int, seed: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(kinds, (rows, width), generator=generator).float()
    wanted = torch.randint(width, (rows, 1), generator=generator)
    shown = []

    def enough(ranked: Tensor, places: Tensor) -> Tensor:
        assert torch.equal(ranked, values.gather(1, places))
        shown.append(ranked.shape[1])
        return (ranked > ranked[:, -1:]).sum(1, keepdim=True).gt(wanted).squeeze(1)

    ranked, places = rank.best_until(values, enough)
    assert ranked.shape == places.shape and shown == sorted(shown)
    for row, right in enumerate(sorted_by_hand(values)):
        decided = right if ranked.shape[1] == width else right[: int((ranked[row] > ranked[row, -1]).sum())]
        assert places[row, : len(decided)].tolist() == decided and len(decided) > int(wanted[row])


@pytest.mark.parametrize("order", ["rising", "falling", "random"])
@pytest.mark.parametrize("count", [0, 1, 15, 100, 3000])
def test_of_wide_rows_those_of_a_stable_sort_come(order: str, count: int) -> None:
    values = torch.randn(3, 3000, generator=torch.Generator().manual_seed(count))
    values[:, ::7] = values[:, :1]
    if order != "random":
        values = values.sort(dim=-1, descending=order == "falling").values
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(rank.best(values, count), expected)
    assert torch.equal(rank.best(values[:, ::2], min(count, 9)), rank.best(values[:, ::2].contiguous(), min(count, 9)))


@pytest.mark.parametrize("count", [1, 3, 60, 180])
def test_a_nan_is_as_low_as_can_be(count: int) -> None:
    values = torch.randn(4, 200)
    values[0, ::3] = torch.nan
    values[1] = torch.nan
    values[2, 100:] = torch.nan
    values[2, :100:2] = -torch.inf
    expected = values.nan_to_num(nan=-torch.inf, neginf=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(rank.best(values, count), expected[:, :count])


@pytest.mark.parametrize("side", ["kernel"], indirect=True)
def test_the_kernel_refuses_what_it_cannot_rank() -> None:
    values = torch.randn(2, 200)
    with pytest.raises(RuntimeError, match="from 1 to 200 of them, not 201"):
        torch.ops.unspool.best(values, 201)
    with pytest.raises(RuntimeError, match=r"of float32, not \[2, 200\] of Double"):
        torch.ops.unspool.best(values.double(), 2)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_copy_comes_with_the_largest_of_each_row(dtype: torch.dtype, width: int, rows: int) -> None:
    values = torch.randn(rows, width).to(dtype)
    for working in (torch.float32, torch.float64):
        copy, top = rank.widened(values, working)
        assert copy.dtype == top.dtype == working
        assert torch.equal(copy, values.to(working)) and torch.equal(top, values.to(working).amax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_of_a_spoilt_row_is_no_number_and_of_a_dead_one_minus_infinity(dtype: torch.dtype) -> None:
    values = torch.randn(5, 37).to(dtype)
    values[0, 3] = values[1, 36] = torch.nan
    values[2], values[3, 5] = -torch.inf, torch.inf
    top = rank.widened(values, torch.float32)[1].tolist()
    assert math.isnan(top[0]) and math.isnan(top[1])
    assert top[2:4] == [-math.inf, math.inf] and math.isfinite(top[4])
