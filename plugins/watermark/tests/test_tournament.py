"""Tournaments: the closed form against tournaments played out, the mean over keys, and which contexts are marked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from unspool.pipeline import Pipeline
from unspool_beam.beam import BeamSearch
from unspool_sample.sample import Sample
from unspool_testing import driver
from unspool_testing.drafters import GuessChains
from unspool_testing.table import TableModel
from unspool_watermark import claims
from unspool_watermark.key import secret
from unspool_watermark.keyed_hash import draws
from unspool_watermark.tournament import Tournament, play

VOCAB = 64


class FakeStep:
    """One row for each prompt with its new tokens; what pads the paths looks like a token."""

    def __init__(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int = 0) -> None:
        self.rows, self.pad = [[*prompt, *new] for prompt, new in rows], pad
        self.length = torch.tensor([len(new) for _, new in rows])

    def paths(self) -> tuple[Tensor, Tensor]:
        longest = max(map(len, self.rows))
        ids = [[*path, *[self.pad] * (longest - len(path))] for path in self.rows]
        return torch.tensor(ids), torch.tensor([len(path) for path in self.rows])


def apply(plugin: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], logits: Tensor, pad: int = 0) -> Tensor:
    out = logits.clone()
    plugin.logits_transform(cast(Any, FakeStep(rows, pad)), out)
    return out


def make(**params: Any) -> Any:
    return driver.plugin(Tournament, "tournament", **{"key": 1, **params})


def won(p: Tensor, drawn: Tensor, depth: int) -> Tensor:
    """Give the winner's distribution: `[rows, vocab]`."""
    return p * play(p.expand(drawn.shape), drawn, depth).exp()


@pytest.mark.parametrize(("vocab", "depth"), [(2, 1), (3, 1), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_the_mean_over_all_keys_that_there_can_be_is_the_plain_distribution(vocab: int, depth: int) -> None:
    # A key chooses the bits of each token and layer, all of them equally often.
    drawn = torch.cartesian_prod(*[torch.arange(2**depth)] * vocab)
    assert len(drawn) == 2 ** (vocab * depth)
    for seed in range(3):
        p = torch.randn(vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)
        marked = won(p, drawn, depth)
        assert (marked.sum(-1) - 1).abs().max() < 1e-12
        assert (marked.mean(0) - p).abs().max() < 1e-12
        assert (marked - p).abs().max() > 0.01, "under one key it is another distribution"


def test_the_mean_over_many_keys_is_the_plain_distribution() -> None:
    keys = torch.tensor([secret(key, "tournament") for key in range(20_000)])
    context = torch.tensor([[3, 1, 4, 1]]).expand(len(keys), -1)
    p = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.015, 0.005], dtype=torch.float64)
    marked = won(p, draws(keys, context, torch.arange(len(p)).unsqueeze(0)), 30)
    error = marked.std(0) / math.sqrt(len(keys))
    assert ((marked.mean(0) - p).abs() < 5 * error).all()
    assert (error < 0.02 * p.clamp(min=0.2)).all(), "the test would see a tenth of a probability"


@pytest.mark.parametrize("layers", [1, 2])
def test_the_closed_form_is_the_winner_of_all_tournaments_played_out(layers: int) -> None:
    vocab, generator = 3, torch.Generator().manual_seed(layers)
    for _ in range(20):
        p = torch.randn(vocab, generator=generator, dtype=torch.float64).softmax(0)
        drawn = torch.randint(0, 2**layers, (1, vocab), generator=generator)
        expected = [0.0] * vocab
        for candidates in itertools.product(range(vocab), repeat=2**layers):
            chance = math.prod(float(p[token]) for token in candidates)
            for winner, share in play_out(candidates, drawn[0].tolist(), 0).items():
                expected[winner] += chance * share
        torch.testing.assert_close(
            won(p, drawn, layers)[0], torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0
        )


def play_out(candidates: Sequence[int], g: Sequence[int], layer: int) -> dict[int, float]:
    """Play one tournament: candidates meet in pairs, winners meet again. Give each winner's probability."""
    if len(candidates) == 1:
        return {candidates[0]: 1.0}
    shares: dict[int, float] = {}
    pairs = list(zip(candidates[::2], candidates[1::2], strict=True))
    for choice in itertools.product((0, 1), repeat=len(pairs)):
        chance, through = 1.0, []
        for pair, chosen in zip(pairs, choice, strict=True):
            bits = [g[token] >> layer & 1 for token in pair]
            chance *= 0.5 if bits[0] == bits[1] else float(bits[chosen] == 1)
            through.append(pair[chosen])
        if chance:
            for winner, share in play_out(through, g, layer + 1).items():
                shares[winner] = shares.get(winner, 0.0) + chance * share
    return shares


def test_it_is_its_definition_in_whole_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    rows: list[tuple[list[int], list[int]]] = [
        (torch.randint(0, 3, (1 + number % 5,), generator=generator).tolist(), [0, 1, 2, 0, 1][:number])
        for number in range(6)
    ]
    logits = torch.randn(len(rows), VOCAB, generator=generator, dtype=torch.float64)
    for width, depth, skips in [(1, 5, True), (2, 30, True), (2, 64, False), (4, 1, True)]:
        plugin = make(context_width=width, depth=depth, skip_repeats=skips)
        out = apply(plugin, rows, logits)
        for number, (prompt, new) in enumerate(rows):
            row = SimpleNamespace(prompt=prompt, tokens=new, path=[*prompt, *new], logits=logits[number].tolist())
            expected = torch.tensor(claims.Tournament.transform(plugin.params, row), dtype=torch.float64)
            torch.testing.assert_close(out[number], expected, atol=1e-9, rtol=0)
        assert torch.equal(out, apply(plugin, rows, logits, pad=2)), "padding must not count"


def test_a_context_that_was_used_before_is_left_unmarked() -> None:
    logits = torch.randn(1, VOCAB)

    def marks(prompt: Sequence[int], new: Sequence[int], **params: Any) -> bool:
        return not torch.equal(apply(make(context_width=2, **params), [(prompt, new)], logits), logits)

    assert marks([1, 2], [])
    assert not marks([1, 2], [1, 2]), "the first new token was chosen after 1 2"
    assert not marks([1, 2], [3, 1, 2]) and not marks([5], [1, 2, 1, 2])
    assert marks([1, 2], [1, 2], skip_repeats=False)
    assert marks([1, 2], [2, 1]) and marks([1, 2], [1, 1])
    assert marks([1, 2, 9, 1, 2], []), "nobody chose the 9 after 1 2: it is the prompt's"
    assert not marks([1, 2, 9, 1, 2], [1, 2])
    assert not marks([1], []) and marks([1], [2]), "two tokens make a context"


def test_what_is_forbidden_stays_so_and_what_is_allowed_stays_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator) * 300  # one token has all the mass that a float can see
    logits[0] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2:, ::2] = -torch.inf
    for dtype in (torch.float32, torch.float64):
        out = apply(make(context_width=1), [([token], []) for token in range(6)], logits.to(dtype))
        assert out.dtype == dtype and not out.isnan().any()
        assert torch.equal(out == -torch.inf, logits == -torch.inf)
        assert torch.equal(out[1], logits[1].to(dtype)), "where there is no choice there is no mark"


def test_a_row_is_the_same_bits_whatever_its_neighbours_allow() -> None:
    generator = torch.Generator().manual_seed(1)
    plugin = make(context_width=1)
    rows: list[tuple[list[int], list[int]]] = [([token], []) for token in range(4)]
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(4, 1000, generator=generator, dtype=dtype) * 3
        for row, kept in ((1, 5), (2, 60)):
            logits[row].masked_fill_(logits[row] < logits[row].topk(kept).values[-1], -torch.inf)
        together = apply(plugin, rows, logits)
        cut = apply(plugin, rows[1:3], logits[1:3])
        assert torch.equal(together[1:3], cut)
        for row in range(4):
            assert torch.equal(apply(plugin, rows[row : row + 1], logits[row : row + 1])[0], together[row])


def test_sums_over_a_large_vocabulary_do_not_depend_on_threads_or_neighbours() -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(3, 50_000, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    drawn = torch.randint(-(2**62), 2**62, p.shape, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone, together = play(p[:1], drawn[:1], 4), play(p, drawn, 4)
        torch.set_num_threads(1)
        single = play(p, drawn, 4)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0]) and torch.equal(together, single)


@pytest.mark.parametrize("strategy", [Sample, BeamSearch])
def test_it_can_be_seen_by_whoever_has_the_key_under_every_strategy(strategy: Any) -> None:
    model = TableModel(vocab_size=VOCAB, spread=1.0)
    plugin = make(context_width=2)
    for marks, name in (([plugin], "marked"), ([], "plain")):
        pipeline = Pipeline(driver.plugin(strategy), marks)
        request = driver.request(pipeline, [3, 4], max_new_tokens=60, end_ids=())
        [result] = driver.alone(model, [request])
        seen = plugin.detector().detect(result.token_ids, before=[3, 4])
        assert (seen.z > 6) if name == "marked" else (abs(seen.z) < 4), name


def test_drafts_change_nothing() -> None:
    model = TableModel(vocab_size=5)
    plugin = make(context_width=1)
    results = []
    for drafters in ([], [driver.plugin(GuessChains, "chains", length=3, vocab_size=5)]):
        pipeline = Pipeline(driver.plugin(Sample), [plugin, *drafters])
        requests = [driver.request(pipeline, [1, 2], max_new_tokens=30, end_ids=(), seed=seed) for seed in range(3)]
        results.append(driver.drive(model, requests))
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in results[1]]
    assert sum(r.stats.accepted for r in results[1]) > 0
