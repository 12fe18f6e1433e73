"""Green lists: who is green, what green is worth, and what becomes of it in texts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from unspool.pipeline import Pipeline
from unspool_beam.beam import BeamSearch
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_testing import driver
from unspool_testing.drafters import GuessChains
from unspool_testing.table import TableModel
from unspool_watermark import claims
from unspool_watermark.green_list import GreenList

VOCAB = 40


class FakeStep:
    """One row for each path; what pads the paths looks like a token."""

    def __init__(self, plugin: Any, paths: Sequence[Sequence[int]], pad: int, delta: Sequence[float] | None) -> None:
        self.rows, self.pad = paths, pad
        self.delta = delta if delta is not None else [plugin.params.delta] * len(paths)

    def paths(self) -> tuple[Tensor, Tensor]:
        longest = max(map(len, self.rows))
        ids = [[*path, *[self.pad] * (longest - len(path))] for path in self.rows]
        return torch.tensor(ids), torch.tensor([len(path) for path in self.rows])

    def values(self, plugin: Any, field: str) -> Tensor:
        return torch.tensor(self.delta)


def apply(
    plugin: Any, paths: Sequence[Sequence[int]], logits: Tensor, pad: int = 0, delta: Sequence[float] | None = None
) -> Tensor:
    out = logits.clone()
    plugin.logits_transform(cast(Any, FakeStep(plugin, paths, pad, delta)), out)
    return out


def make(**params: Any) -> Any:
    return driver.plugin(GreenList, "green_list", **{"key": 1, **params})


def row(path: Sequence[int], logits: Tensor) -> Any:
    return SimpleNamespace(path=tuple(path), logits=logits.tolist())


@pytest.mark.parametrize("scheme", ["left_hash", "self_hash"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_its_definition_in_whole_numbers(scheme: str, width: int) -> None:
    plugin = make(key="a secret", gamma=0.4, delta=3.0, scheme=scheme, context_width=width)
    generator = torch.Generator().manual_seed(width)
    paths = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (1, 2, 3, 4, 7, 12)]
    logits = torch.randn(len(paths), VOCAB, generator=generator, dtype=torch.float64)
    out = apply(plugin, paths, logits)
    expected = [
        claims.GreenList.transform(plugin.params, row(path, values)) for path, values in zip(paths, logits, strict=True)
    ]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(out, apply(plugin, paths, logits, pad=7)), "padding must not count"
    for number, path in enumerate(paths):
        assert torch.equal(apply(plugin, [path], logits[number : number + 1])[0], out[number])


@pytest.mark.parametrize("scheme", ["left_hash", "self_hash"])
@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_the_share_of_green_tokens_is_gamma_in_expectation(scheme: str, gamma: float) -> None:
    plugin = make(gamma=gamma, scheme=scheme, context_width=3)
    paths = torch.cartesian_prod(torch.arange(8), torch.arange(8), torch.arange(8)).tolist()
    green = apply(plugin, paths, torch.zeros(len(paths), 200)) > 0
    different = green.double() if scheme == "left_hash" else green[:: 8 * 8 + 9].double()  # self_hash shares pairs
    assert abs(float(different.mean()) - gamma) < 5 * (gamma * (1 - gamma) / different.numel()) ** 0.5


def test_a_forbidden_token_stays_forbidden_and_a_dead_row_dead() -> None:
    logits = torch.randn(4, VOCAB)
    logits[0] = -torch.inf
    logits[1:, ::3] = -torch.inf
    for scheme in ("left_hash", "self_hash"):
        out = apply(make(scheme=scheme, delta=100.0), [[1, 2], [2, 3], [3, 4], [4, 5]], logits)
        assert torch.equal(out == -torch.inf, logits == -torch.inf) and not out.isnan().any()


def test_a_path_that_is_too_short_for_a_context_is_left_as_it_is() -> None:
    logits = torch.randn(3, VOCAB)
    out = apply(make(context_width=3), [[1, 2], [1, 2, 3], [5]], logits)
    assert torch.equal(out[0], logits[0]) and torch.equal(out[2], logits[2]) and not torch.equal(out[1], logits[1])
    out = apply(make(context_width=3, scheme="self_hash"), [[1, 2], [1, 2, 3], [5]], logits)
    assert torch.equal(out[2], logits[2]) and not torch.equal(out[0], logits[0]), "the token itself is one of three"


def test_requests_of_one_batch_may_differ_in_delta() -> None:
    logits = torch.zeros(3, VOCAB)
    out = apply(make(), [[4], [4], [4]], logits, delta=[0.0, 1.0, 2.5])
    assert out[0].count_nonzero() == 0
    assert torch.equal(out[1] * 2.5, out[2]) and out[1].max() == 1


def test_another_key_context_or_scheme_makes_another_list() -> None:
    def greens(path: Sequence[int], **params: Any) -> tuple[bool, ...]:
        return tuple((apply(make(gamma=0.5, **params), [path], torch.zeros(1, VOCAB))[0] > 0).tolist())

    lists = {
        greens([1, 2]),
        greens([1, 3]),
        greens([1, 2], key=2),
        greens([1, 2], context_width=2),
        greens([2, 1], context_width=2),
        greens([1, 2], context_width=2, scheme="self_hash"),
    }
    assert len(lists) == 6
    assert greens([1, 2]) == greens([7, 2]), "one token is all the context that there is"


def test_self_hash_of_one_token_is_one_list_for_all_contexts() -> None:
    out = apply(make(scheme="self_hash"), [[token, token + 1] for token in range(10)], torch.zeros(10, VOCAB))
    assert (out == out[0]).all() and 0 < out[0].count_nonzero() < VOCAB


def test_self_hash_outlives_a_change_of_the_tokens_that_do_not_decide() -> None:
    # One of five anchors changes: a token keeps its colour unless that one decided, or decides now.
    kept = {}
    for scheme in ("left_hash", "self_hash"):
        plugin = make(scheme=scheme, context_width=5, gamma=0.5)
        paths = [[9, 8, 7, 6, 5], [9, 8, 7, 6, 4]]
        out = apply(plugin, paths, torch.zeros(2, 5000))
        kept[scheme] = float((out[0] == out[1]).double().mean())
    assert abs(kept["left_hash"] - 0.5) < 0.04
    # A third of the draws is new (one of 6 anchors of both texts decided), and half of those keep their colour.
    assert abs(kept["self_hash"] - (1 - 2 / 6 / 2)) < 0.04


@pytest.mark.parametrize("strategy", [Greedy, Sample, BeamSearch])
def test_it_raises_the_share_of_green_tokens_under_every_strategy(strategy: Any) -> None:
    model = TableModel(vocab_size=VOCAB, spread=1.0)
    shares = {}
    for delta in (0.0, 3.0):
        plugin = make(delta=delta)
        pipeline = Pipeline(driver.plugin(strategy), [plugin])
        [result] = driver.alone(model, [driver.request(pipeline, [3], max_new_tokens=100, end_ids=())])
        shares[delta] = plugin.detector().detect(result.token_ids, before=[3])
    assert shares[3.0].z > 5 and abs(shares[0.0].z) < 4
    assert shares[3.0].score > 0.5 > shares[0.0].score


@pytest.mark.parametrize("scheme", ["left_hash", "self_hash"])
def test_drafts_change_nothing(scheme: str) -> None:
    model = TableModel(vocab_size=5)
    plugin = make(scheme=scheme, context_width=2)
    results = []
    for drafters in ([], [driver.plugin(GuessChains, "chains", length=3, vocab_size=5)]):
        pipeline = Pipeline(driver.plugin(Sample), [plugin, *drafters])
        requests = [driver.request(pipeline, [1, 2], max_new_tokens=30, end_ids=(), seed=seed) for seed in range(3)]
        results.append(driver.drive(model, requests))
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in results[1]]
    assert sum(r.stats.accepted for r in results[1]) > 0
