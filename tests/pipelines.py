"""The pipelines and drafters that the laws are checked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hypothesis import strategies as st
from small_plugins import Calm, EarlyExit, FirstLayers, Impatient, Mood, Sated, Voting

from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import PreparedRequest
from unspool_greedy import Greedy
from unspool_many.asap import ASAp
from unspool_penalties.repetition import RepetitionPenalty
from unspool_sample.mirostat import Mirostat
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_speculative.draft_model import DraftModel as SmallModel
from unspool_speculative.layer_skip import LayerSkip
from unspool_speculative.prompt_lookup import PromptLookup
from unspool_speculative.suffix import Suffix
from unspool_testing.drafters import DraftModel, GuessChains, GuessTrees, Recall
from unspool_testing.driver import plugin, request
from unspool_testing.hosts import Bias, Forks, Guidance, LookAheadChoice, NarrowSearch, NoDoubles, Particles, Tired

PIPELINES: Mapping[str, Callable[[], Pipeline]] = {
    "greedy": lambda: Pipeline(plugin(Greedy)),
    "sample": lambda: Pipeline(plugin(Sample), [plugin(Temperature, temperature=1.3), plugin(TopK, k=3)]),
    "uniform": lambda: Pipeline(plugin(Sample, noise="uniform"), [plugin(RepetitionPenalty, penalty=1.3)]),
    "mirostat": lambda: Pipeline(plugin(Sample), [plugin(Mirostat, tau=1.5, eta=0.5)]),
    "calm": lambda: Pipeline(plugin(Greedy), [plugin(Tired), plugin(Calm)]),
    "grammar": lambda: Pipeline(plugin(Sample), [plugin(Bias), plugin(NoDoubles), plugin(Sated)]),
    "guidance": lambda: Pipeline(plugin(Sample), [plugin(Guidance)]),
    "layers": lambda: Pipeline(plugin(Greedy), [plugin(FirstLayers), plugin(EarlyExit)]),
    "mood": lambda: Pipeline(plugin(Sample), [plugin(Mood), plugin(Tired)]),
    "mood and layers": lambda: Pipeline(plugin(Sample), [plugin(Mood), plugin(FirstLayers), plugin(Guidance)]),
    "forks": lambda: Pipeline(plugin(Forks), [plugin(Tired)]),
    "voting": lambda: Pipeline(plugin(Voting), [plugin(Calm)]),
    "search": lambda: Pipeline(plugin(NarrowSearch, children=2, width=2)),
    "search, grammar": lambda: Pipeline(
        plugin(NarrowSearch, children=3, width=3, enough=3), [plugin(NoDoubles), plugin(Calm), plugin(Guidance)]
    ),
    "particles": lambda: Pipeline(plugin(Particles), [plugin(Tired)]),
    "asap": lambda: Pipeline(plugin(ASAp, samples=4, together=2), [plugin(NoDoubles)]),
    "choice": lambda: Pipeline(plugin(LookAheadChoice)),
    "choice, hesitant": lambda: Pipeline(
        plugin(LookAheadChoice, margin=1.0), [plugin(Bias, bias=2.0), plugin(Guidance)]
    ),
    "impatient": lambda: Pipeline(plugin(Impatient), [plugin(Tired)]),
    "choice, grammar": lambda: Pipeline(
        plugin(LookAheadChoice, k=2, by="likeness"), [plugin(NoDoubles, most=5), plugin(Guidance), plugin(EarlyExit)]
    ),
}

MOST_BRANCHES = {"forks": 4, "search": 2, "search, grammar": 3, "asap": 3}
"""Of pipelines whose requests may have more branches than they begin with."""


def drafters(vocab_size: int, draft_model: str | None = "draft") -> Mapping[str, Callable[[int], Plugin]]:
    """Give the drafters, each made from a seed."""
    return {
        "chains": lambda seed: plugin(GuessChains, seed=seed, vocab_size=vocab_size, length=2 + seed % 7),
        "trees": lambda seed: plugin(GuessTrees, seed=seed, vocab_size=vocab_size, width=1 + seed % 4),
        "recall": lambda seed: plugin(Recall),
        "draft model": lambda seed: plugin(DraftModel, model=draft_model, length=2 + seed % 3),
        "first layers": lambda seed: plugin(DraftModel, layers=1 + seed % 2),
        "itself": lambda seed: plugin(DraftModel, length=4),
        "prompt lookup": lambda seed: plugin(PromptLookup, length=1 + seed % 6, min_ngram=1, adapt=seed % 2 > 0),
        "suffix": lambda seed: plugin(Suffix, length=1 + seed % 6, min_match=1, adapt=seed % 2 > 0),
        "small model": lambda seed: plugin(
            SmallModel,
            "small",
            model=draft_model or "draft",
            length=1 + seed % 3,
            width=1 + seed % 3,
            adapt=seed % 2 > 0,
        ),
        "layer skip": lambda seed: plugin(LayerSkip, layers=1 + seed % 2, length=1 + seed % 3, adapt=seed % 2 > 0),
    }


def slots_for(asked: PreparedRequest, name: str) -> int:
    """Say how many slots a request needs when it is alone."""
    pipeline = asked.pipeline
    branches = MOST_BRANCHES.get(name, pipeline.strategy.start(asked))
    new = branches * (asked.limits.max_new_tokens - 1) + (
        3 * branches if pipeline.strategy.holds or name == "impatient" else 0
    )
    prompts = [
        asked.prompt_ids,
        *(pipeline.companion_prompt(name, asked) or asked.prompt_ids for name in pipeline.companions),
    ]
    return sum(len(prompt) + new for prompt in prompts)


@st.composite
def requests(draw: st.DrawFn, pipeline: Pipeline, vocab_size: int) -> PreparedRequest:
    """Draw a request of a pipeline. Token 0 ends a text."""
    most = draw(st.integers(1, 8))
    parameters: dict[str, object] = {}
    if "bias" in pipeline.parameters:
        parameters["bias"] = Bias.Params(token=draw(st.integers(0, vocab_size - 1)), bias=draw(st.floats(-2, 2)))
    return request(
        pipeline,
        draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6)),
        max_new_tokens=most,
        min_new_tokens=draw(st.integers(0, most)),
        end_ids=draw(st.sampled_from([(0,), (0,), (), (0, 2)])),
        seed=draw(st.integers(0, 2**63 - 1)),
        n=draw(st.integers(1, 3)),
        logprobs=draw(st.sampled_from([None, "model", "pipeline"])),
        parameters=parameters,
    )
