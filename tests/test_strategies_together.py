"""Every strategy beside every other in one batch, and under every drafter: each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
from pipelines import drafters

import unspool
from unspool.errors import ConfigError
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest
from unspool_beam.beam import BeamSearch
from unspool_beam.constrained import ConstrainedBeamSearch
from unspool_beam.diverse import DiverseBeamSearch
from unspool_beam.stochastic import StochasticBeamSearch
from unspool_contrastive.decoding import ContrastiveDecoding
from unspool_contrastive.dola import Dola
from unspool_contrastive.guidance import Guidance
from unspool_contrastive.search import ContrastiveSearch
from unspool_greedy import Greedy
from unspool_many.best_of import BestOf
from unspool_many.mbr import MinimumBayesRisk
from unspool_many.particles import Particles
from unspool_many.self_consistency import SelfConsistency
from unspool_penalties.no_repeat_ngram import NoRepeatNgram
from unspool_sample.mirostat import Mirostat
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_sample.top_p import TopP
from unspool_testing.compare import check_batch, check_speculation, with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, drive, plugin, request
from unspool_testing.networks import tiny_model
from unspool_watermark.green_list import GreenList
from unspool_watermark.tournament import Tournament

VOCAB = 64
SEARCHES: Mapping[str, Callable[[], Pipeline]] = {
    "greedy": lambda: Pipeline(plugin(Greedy)),
    "sample": lambda: Pipeline(plugin(Sample), [plugin(Temperature, temperature=1.2), plugin(TopP, p=0.9)]),
    "beam": lambda: Pipeline(plugin(BeamSearch, width=4)),
    "beam, guided": lambda: Pipeline(plugin(BeamSearch, width=3), [plugin(Guidance, scale=1.8)]),
    "beam, mirostat": lambda: Pipeline(plugin(BeamSearch, width=2), [plugin(Mirostat)]),
    "diverse beam": lambda: Pipeline(plugin(DiverseBeamSearch, width=4, groups=2, diversity=0.7)),
    "constrained beam": lambda: Pipeline(plugin(ConstrainedBeamSearch, width=4, phrases=[[7, 9], [11]])),
    "stochastic beam": lambda: Pipeline(plugin(StochasticBeamSearch, width=3)),
    "contrastive search": lambda: Pipeline(plugin(ContrastiveSearch, top_k=3)),
    "contrastive search, no repeats": lambda: Pipeline(
        plugin(ContrastiveSearch, top_k=4), [plugin(NoRepeatNgram, n=2), plugin(Guidance)]
    ),
    "contrastive decoding": lambda: Pipeline(plugin(Sample), [plugin(ContrastiveDecoding, layers=1)]),
    "DoLa": lambda: Pipeline(plugin(Greedy), [plugin(Dola, layers=[0, 1, 2])]),
    "guidance": lambda: Pipeline(plugin(Sample), [plugin(Guidance, negative_prompt=[5, 6, 7])]),
    "best of": lambda: Pipeline(plugin(BestOf, samples=4)),
    "self-consistency": lambda: Pipeline(plugin(SelfConsistency, samples=4)),
    "minimum Bayes risk": lambda: Pipeline(plugin(MinimumBayesRisk, samples=4)),
    "particles": lambda: Pipeline(plugin(Particles, particles=5), [plugin(Temperature, temperature=1.5)]),
    "green list": lambda: Pipeline(plugin(Sample), [plugin(GreenList, key=3)]),
    "tournament": lambda: Pipeline(plugin(Sample), [plugin(Tournament, key=3)]),
}
MADE = {name: make() for name, make in SEARCHES.items()}
ARCHITECTURES = ["llama", "gemma3_text", "gpt2"]
CIRCUMSTANCES = [
    Circumstances(),
    Circumstances(token_budget=9, max_running=7, arrivals=tuple(range(0, 60, 3))),
    Circumstances(slots=260, token_budget=40, preempts=frozenset({2, 5, 9})),
]


@cache
def runner(arch: str) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch))


def asked(name: str, seed: int = 0) -> PreparedRequest:
    most = 1 if name.startswith("contrastive search") else 2
    prompt = (2, 9, 5 + seed, *range(20, 20 + seed))
    return request(MADE[name], prompt, max_new_tokens=9, end_ids=(1, 33), seed=seed, n=most, logprobs="pipeline")


@pytest.mark.parametrize("circumstances", CIRCUMSTANCES, ids=["room for all", "late and slow", "few slots"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_of_all_strategies_gives_each_request_what_it_gets_alone(
    arch: str, circumstances: Circumstances
) -> None:
    results = check_batch(runner(arch), [asked(name, seed) for seed in range(2) for name in SEARCHES], circumstances)
    assert not [result.error for result in results if result.error]


@pytest.mark.parametrize("drafter", drafters(VOCAB))
@pytest.mark.parametrize("name", SEARCHES)
def test_no_drafter_changes_a_text(name: str, drafter: str) -> None:
    plain = MADE[name]
    asks = drafter in ("draft model", "first layers", "itself")
    for seed in range(2):
        made = drafters(VOCAB)[drafter](seed)
        if asks and not (plain.strategy.row_local and not plain.strategy.holds):
            with pytest.raises(ConfigError, match="cannot say what it would choose"):
                with_plugin(plain, made)
            return
        one = asked(name, seed)
        drafting = with_pipeline(one, with_plugin(plain, made)).pipeline
        check_speculation(runner("llama"), one, plain, drafting, models={"draft": runner("gpt2")})


@pytest.mark.parametrize("name", ["beam", "diverse beam", "stochastic beam", "best of", "particles"])
def test_the_prompt_of_many_branches_is_run_and_held_once(name: str) -> None:
    taken: list[int] = []
    prompt, new, most = tuple(range(2, 52)), 9, 5
    one = request(MADE[name], prompt, max_new_tokens=new, end_ids=())
    (result,) = drive(runner("llama"), [one], watch=lambda loop: taken.append(_taken(loop)))
    assert len(prompt) < max(taken) <= len(prompt) + most * (new - 1)
    assert result.stats.rows <= len(prompt) + most * (new - 1)


def _taken(loop: Loop) -> int:
    cache = loop.main.cache
    return cache.pool.size - cache.free


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        yield engine


MIXED: list[dict[str, Any]] = [
    {"strategy": {"beam": {"width": 4}}, "n": 4},
    {"strategy": {"diverse_beam": {"width": 4, "groups": 2}}, "n": 4},
    {"strategy": {"contrastive_search": {"top_k": 4}}},
    {"strategy": "greedy", "plugins": [{"dola": {"layers": [8, 16, 22]}}]},
    {"strategy": "greedy", "plugins": [{"guidance": {"scale": 1.5}}]},
    {"strategy": {"best_of": {"samples": 4}}, "n": 2},
    {"strategy": "greedy"},
    {"strategy": "sample", "plugins": [{"temperature": 0.8}]},
    {"strategy": {"constrained_beam": {"width": 4, "phrases": ["of course"]}}},
    {"strategy": {"stochastic_beam": {"width": 3}}, "n": 3},
    {"strategy": {"particles": {"particles": 4}}, "n": 4},
]


@pytest.mark.real_model
@pytest.mark.slow
def test_a_mixed_batch_of_the_real_model_gives_each_request_what_it_gets_alone(engine: unspool.Engine) -> None:
    prompts = ["Name a fruit.", "Why is the sky blue?"]
    requests = [
        unspool.Request(prompt=prompt, max_new_tokens=10, seed=7, id=f"{number}-{place}", **options)
        for place, options in enumerate(MIXED)
        for number, prompt in enumerate(prompts)
    ]
    together = list(engine.run(requests, ordered=True))
    for one, mixed in zip(requests, together, strict=True):
        (alone,) = engine.run([one])
        assert mixed.error is None and alone.error is None
        assert [h.token_ids for h in mixed.hypotheses] == [h.token_ids for h in alone.hypotheses], one.strategy
        assert [h.score for h in mixed.hypotheses] == pytest.approx([h.score for h in alone.hypotheses], abs=1e-3)
