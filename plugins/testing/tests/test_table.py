"""The exact model is what it says, and its cache notices every mistake that a core could make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from unspool.runner import Batch, Span
from unspool_testing.enumeration import enumerate_texts
from unspool_testing.table import CacheError, TableModel


def batch(
    tokens: Sequence[int],
    positions: Sequence[int],
    slots: Sequence[int],
    spans: Sequence[Span],
    wanted: Sequence[int] | None = None,
    hidden: Sequence[int] = (),
    layers: int | None = None,
) -> Batch:
    rows = range(len(tokens)) if wanted is None else wanted
    return Batch(at(*tokens), at(*positions), at(*slots), spans, at(*rows), hidden, layers)


def at(*slots: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(slots, dtype=np.int64)


def see(*rows: str) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    return np.array([[mark == "x" for mark in row] for row in rows])


@pytest.fixture
def model() -> TableModel:
    """Make a model whose slots 0 to 2 hold the prompt 1 2 3."""
    made = TableModel(5)
    made.allocate(12)
    made.forward(batch([1, 2, 3], [0, 1, 2], [0, 1, 2], [Span(0, 3, slice(0, 3))]))
    return made


def test_a_chain_gives_what_follows_each_of_its_prefixes() -> None:
    model = TableModel(5)
    model.allocate(4)
    output = model.forward(batch([1, 2, 3], [0, 1, 2], [3, 0, 2], [Span(0, 3, at(3, 0, 2))], [1, 2], [0, 2, -1]))
    torch.testing.assert_close(output.logits, torch.stack([model.logits_after(p) for p in ([1, 2], [1, 2, 3])]))
    for layer, hidden in output.hidden.items():
        expected = [model.hidden_after(path, layer) for path in ([1], [1, 2], [1, 2, 3])]
        torch.testing.assert_close(hidden, torch.stack(expected))
    assert (model.passes, model.tokens) == (1, 3)


def test_a_tree_gives_what_follows_each_of_its_paths(model: TableModel) -> None:
    mask = see("xxxx..", "xxx.x.", "xxxx.x")
    output = model.forward(batch([4, 0, 4], [3, 3, 4], [5, 6, 7], [Span(0, 3, at(0, 1, 2, 5, 6, 7), mask)]))
    paths = ([1, 2, 3, 4], [1, 2, 3, 0], [1, 2, 3, 4, 4])
    torch.testing.assert_close(output.logits, torch.stack([model.logits_after(path) for path in paths]))


CHAIN = Span(0, 1, at(0, 1, 2, 5))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (batch([4], [3], [5], [Span(0, 1, at(0, 1, 5))]), "each position up to its own once"),
        (batch([4], [4], [5], [CHAIN]), "each position up to its own once"),
        (batch([4], [3], [5], [Span(0, 1, at(1, 0, 2, 5))]), "in the order of its path"),
        (batch([4], [3], [5], [Span(0, 1, at(0, 1, 8, 5))]), "holds nothing"),
        (batch([4], [3], [5], [Span(0, 1, at(0, 1, 2, 2, 5))]), "names a slot twice"),
        (batch([4], [3], [5], [Span(0, 1, at(0, 1, 5, 2))]), "must end in its own slots"),
        (batch([4, 0], [3, 3], [5, 5], [Span(0, 2, at(0, 1, 2, 5), see("xxxx", "xxxx"))]), "written twice"),
        (batch([4], [3], [12], [Span(0, 1, at(0, 1, 2, 12))]), "outside a pool of 12"),
        (batch([5], [3], [5], [CHAIN]), "outside a vocabulary"),
        (batch([4], [3], [5], [CHAIN], [1]), "wanted must ascend"),
        (batch([4, 0], [3, 4], [5, 6], [CHAIN]), "spans cover 1 of 2"),
        (batch([4, 0], [3, 3], [5, 6], [Span(0, 2, at(0, 1, 2, 5, 6), see("xxxx.", "xxxxx"))]), "each position"),
        (batch([4, 0], [3, 3], [5, 6], [Span(0, 2, at(0, 1, 2, 5, 6), see("xxx.x", "xxxx."))]), "at its own position"),
        (batch([4], [3], [5], [CHAIN], layers=1), "runs 1 layers and sees slots of"),
        (batch([4], [3], [5], [Span(0, 1, at(0, 1, 2, 5))], hidden=[4]), "hidden states of layers"),
    ],
)
def test_a_mistake_is_an_error_and_not_a_number(model: TableModel, wrong: Batch, reason: str) -> None:
    with pytest.raises(CacheError, match=reason):
        model.forward(wrong)


def test_a_slot_of_another_path_is_noticed_though_tokens_and_positions_fit(model: TableModel) -> None:
    model.forward(batch([1, 0], [0, 1], [8, 9], [Span(0, 2, at(8, 9))]))
    model.forward(batch([3], [2], [10], [Span(0, 1, at(8, 9, 10))]))
    with pytest.raises(CacheError, match="run after another path"):
        model.forward(batch([4], [3], [5], [Span(0, 1, at(0, 1, 10, 5))]))


def test_a_slot_that_was_freed_is_noticed_once_poisoned(model: TableModel) -> None:
    model.poison([1])
    with pytest.raises(CacheError, match="holds nothing"):
        model.forward(batch([4], [3], [5], [CHAIN]))


def test_explicit_logits_go_by_the_longest_ending_and_a_memory_forgets() -> None:
    model = TableModel(2, table={(): [0, 1], (1,): [2, 3], (0, 1): [4, 5]})
    assert [model.logits_after(p).tolist() for p in ([0], [1, 1], [1, 0, 1])] == [[0, 1], [2, 3], [4, 5]]
    short = TableModel(4, memory=1)
    assert torch.equal(short.logits_after([1, 2, 3]), short.logits_after([0, 3]))
    whole = TableModel(4)
    assert not torch.equal(whole.logits_after([1, 2, 3]), whole.logits_after([0, 3]))
    assert not torch.equal(whole.logits_after([1]), TableModel(4, seed=1).logits_after([1]))


def test_the_head_of_an_earlier_layer_is_what_a_companion_of_so_many_layers_says(model: TableModel) -> None:
    early = model.head(model.hidden_after([1, 2], 1))
    assert torch.equal(early, model.logits_after([1, 2], layers=1))
    assert not torch.equal(early, model.logits_after([1, 2]))


def test_brute_force_finds_every_text_and_their_probabilities_sum_to_1() -> None:
    texts = enumerate_texts(TableModel(3), [1, 2], 3)
    assert len(texts) == 1 + 2 + 4 * 3
    assert sum(map(math.exp, texts.values())) == pytest.approx(1)
    assert all(len(text) == 3 or text[-1] == 0 for text in texts)
