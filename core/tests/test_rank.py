"""The best of each row come in one order, and no more of them are ranked than it takes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unspool import rank

TABLES = st.lists(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5), min_size=1)


def sorted_by_hand(values: Tensor) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda place: (-row[place], place)) for row in values.tolist()]


@given(TABLES, st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_of_equal_values_the_first_comes_first(table: list[list[float]], count: int, dtype: torch.dtype) -> None:
    values = torch.tensor(table, dtype=dtype)
    by_hand = sorted_by_hand(values)
    assert rank.best(values, count).tolist() == [row[:count] for row in by_hand]
    assert rank.argmax(values).tolist() == [row[0] for row in by_hand]


@given(st.integers(1, 90), st.integers(1, 3), st.integers(0, 5), st.integers(1, 40), st.data())
def test_ties_are_told_apart_wherever_they_end(
    width: int, rows: int, seed: int, kinds: int, data: st.DataObject
) -> None:
    """Within what is looked at first, at its edge, and far beyond it."""
    values = torch.randint(kinds, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    count = data.draw(st.integers(1, width))
    assert rank.best(values, count).tolist() == [row[:count] for row in sorted_by_hand(values)]


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
