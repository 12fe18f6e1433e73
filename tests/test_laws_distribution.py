"""Laws 6 and 7: sampling draws from the transformed distribution, and a search finds what brute force finds."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import drafters
from torch import Tensor

from unspool.pipeline import Pipeline
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_testing.compare import texts, with_plugin
from unspool_testing.driver import Circumstances, drive, plugin, request
from unspool_testing.enumeration import enumerate_texts
from unspool_testing.hosts import Forks, NarrowSearch, NoDoubles, Particles
from unspool_testing.table import Path, TableModel

VOCAB, DRAWS = 3, 3000


def same_distribution(counts: Counter[Path], exact: dict[Path, float], draws: int) -> None:
    """Check by a chi-squared test at 1e-6 (the seeds are fixed, so it passes always or never)."""
    assert set(counts) <= set(exact), "only possible texts are drawn"
    common = {text: math.exp(logprob) * draws for text, logprob in exact.items()}
    rare = sum(expected for expected in common.values() if expected < 5)
    cells = [(counts[text], expected) for text, expected in common.items() if expected >= 5]
    cells += [(draws - sum(seen for seen, _ in cells), rare)] if rare >= 5 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty: the cube root of a chi-squared number over its freedom is near normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.8, f"chi-squared {statistic:.1f} of {freedom}"


def shaped(path: Path, logits: Tensor) -> Tensor:
    """Temperature 1.5, then top-k 2, by hand."""
    logits = logits / 1.5
    return logits.masked_fill(logits < logits.topk(2).values[-1], -torch.inf)


@pytest.mark.parametrize("drafter", [None, "trees", "itself"])
@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_frequencies_are_those_of_the_exact_distribution(noise: str, drafter: str | None) -> None:
    model = TableModel(VOCAB, seed=2)
    pipeline = Pipeline(plugin(Sample, noise=noise), [plugin(Temperature, temperature=1.5), plugin(TopK, k=2)])
    pipeline = with_plugin(pipeline, drafters(VOCAB)[drafter](1)) if drafter else pipeline
    # Half of the draws by seed, half by stream: both must be independent.
    asked = [request(pipeline, (1,), max_new_tokens=4, seed=s, n=10, min_new_tokens=1) for s in range(DRAWS // 10)]
    counts = Counter(text for r in drive(model, asked, Circumstances(token_budget=4000)) for text, _ in texts(r))
    exact = enumerate_texts(model, (1,), 4, transform=shaped, min_new_tokens=1)
    assert sum(map(math.exp, exact.values())) == pytest.approx(1)
    same_distribution(counts, exact, DRAWS)


def test_forked_streams_draw_from_the_same_distribution() -> None:
    model, pipeline = TableModel(VOCAB, seed=2), Pipeline(plugin(Forks, forks=1))
    asked = [request(pipeline, (1,), max_new_tokens=4, seed=seed, n=2) for seed in range(DRAWS)]
    results = drive(model, asked, Circumstances(token_budget=10**4, slots=20000))
    exact = enumerate_texts(model, (1,), 4)
    for stream in range(2):
        same_distribution(
            Counter(h.token_ids for r in results for h in r.hypotheses if h.stream == stream), exact, DRAWS
        )


def test_children_in_two_streams_on_one_node_part_later() -> None:
    model, pipeline = TableModel(VOCAB, seed=2), Pipeline(plugin(Forks, forks=2))
    asked = [request(pipeline, (1,), max_new_tokens=6, seed=seed, n=4, end_ids=()) for seed in range(40)]
    said = [sorted(text for text, _ in texts(result)) for result in drive(model, asked)]
    assert any(a[:2] == b[:2] and a != b for text in said for a, b in itertools.pairwise(text))


def test_particles_keep_their_number_and_their_scores_are_sums_of_model_logprobs() -> None:
    model, pipeline = TableModel(VOCAB, seed=2), Pipeline(plugin(Particles))
    asked = [request(pipeline, (1,), max_new_tokens=5, seed=s, n=4, end_ids=(), logprobs="model") for s in range(30)]
    for result in drive(model, asked):
        assert len(result.hypotheses) == 4
        for h in result.hypotheses:
            assert h.score == pytest.approx(sum(h.logprobs or ()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 4), most=st.integers(1, 4), grammar=st.booleans())
def test_a_search_of_full_width_finds_what_brute_force_finds(seed: int, vocab: int, most: int, grammar: bool) -> None:
    model = TableModel(vocab, seed=seed)
    search = plugin(NarrowSearch, children=vocab, width=vocab**most)
    pipeline = Pipeline(search, [plugin(NoDoubles, most=9)] if grammar else [])

    def mask(path: Path, logits: Tensor) -> Tensor:
        last = path[-1] if path else 1
        return logits.index_fill(0, torch.tensor([last]), -torch.inf) if grammar else logits

    exact = enumerate_texts(model, (1,), most, transform=mask)
    ranked = sorted(exact.items(), key=lambda item: -item[1])
    result = drive(model, [request(pipeline, (1,), max_new_tokens=most, n=len(ranked))])[0]
    assert [h.score for h in result.hypotheses] == pytest.approx([score for _, score in ranked])
    assert {h.token_ids for h in result.hypotheses} == set(exact)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_search_of_width_1_is_greedy(seed: int) -> None:
    model = TableModel(4, seed=seed)
    narrow = Pipeline(plugin(NarrowSearch, children=1, width=1, enough=1))
    one, other = (drive(model, [request(p, (1, 2))])[0] for p in (narrow, Pipeline(plugin(Greedy))))
    assert texts(one) == texts(other)


def test_the_noise_of_a_request_does_not_depend_on_its_neighbours_number() -> None:
    model, pipeline = TableModel(5), Pipeline(plugin(Sample))
    few = drive(model, [request(pipeline, seed=3, n=2)])[0]
    many = drive(model, [request(pipeline, seed=3, n=5)])[0]
    assert texts(many)[:2] == texts(few), "a stream says the same, however many there are"
