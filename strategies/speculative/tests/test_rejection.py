"""Rejection sampling draws from the target's distribution: exactly, and from no other.

Two kinds of proof. In the first the strategy runs as it is, in the real loop, and every outcome of its random numbers
is walked, with its probability; so the distribution of its texts is a sum, and equals the target's to the last digits.
In the second the real noise is used, for thousands of seeds and streams, and what comes is counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_sample.mirostat import Mirostat
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_sample.xtc import Xtc
from unspool_speculative import rejection as module
from unspool_speculative.prompt_lookup import PromptLookup
from unspool_speculative.rejection import Rejection, accepts, residual
from unspool_testing import walk as walks
from unspool_testing.compare import check_batch, texts
from unspool_testing.driver import GOOD, Circumstances, alone, drive, least_slots, plugin, request
from unspool_testing.enumeration import Transform, enumerate_texts
from unspool_testing.hosts import Bias, NoDoubles, Tired
from unspool_testing.table import TableModel

Text = tuple[int, ...]
REAL_ACCEPTS = module.accepts
MODELS = {f"other {vocab}": TableModel(vocab, seed=9, memory=1) for vocab in (2, 3, 4)}


# ---- every outcome, with its probability -----------------------------------------------------------------------------


@dataclass
class Walk(walks.Walk):
    """All ways that draws and judgements can go."""

    judged: bool = False
    """Some draft was accepted or rejected."""

    def accepts(self, p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
        """Let the real function decide, with a number from each side of p / q."""
        self.judged, numbers = True, []
        for ratio in (p / q).tolist():
            pieces = [(0.0, min(ratio, 1.0)), (min(ratio, 1.0), 1.0)]
            pieces = [(low, high) for low, high in pieces if low < high]
            low, high = pieces[self.choose([high - low for low, high in pieces])]
            numbers.append((low + high) / 2)
        return REAL_ACCEPTS(p, q, torch.tensor(numbers, dtype=torch.float64))


@dataclass(frozen=True)
class Case:
    """A pipeline on a small table, and what its plugins do to the logits."""

    plugins: Callable[[], list[Plugin]] = list
    transform: Transform = lambda _, logits: logits
    vocab: int = 3
    new: int = 2
    least: int = 0
    ends: Text = (0,)
    length: int = 2
    drafter: Mapping[str, Any] | None = None
    """None: a model that knows the last token only."""
    prompt: Text = (1, 2, 1)


def bend(path: Text, logits: Tensor) -> Tensor:
    """Do what a temperature of 0.5 and the two likeliest tokens do."""
    logits = logits / 0.5
    return logits.masked_fill(logits < logits.topk(2).values[-1], -math.inf)


def no_doubles(path: Text, logits: Tensor) -> Tensor:
    logits[([1, 2, 1, *path])[-1]] = -math.inf
    return logits


def tire(path: Text, logits: Tensor) -> Tensor:
    return logits / (1 + 0.1 * sum(path))


CASES = {
    "an end inside the drafts": Case(vocab=2, new=4, length=3, prompt=(1, 0, 1)),
    "a limit inside the drafts": Case(length=4),
    "a limit at the last draft": Case(ends=()),
    "one draft": Case(vocab=2, new=4, length=1, prompt=(1, 0, 1)),
    "two ends": Case(vocab=3, ends=(0, 2)),
    "ends that are banned at first": Case(vocab=3, new=3, least=2, ends=(0, 2)),
    "ends that are banned to the end": Case(vocab=3, new=2, least=2),
    "a temperature and the two likeliest": Case(
        lambda: [plugin(Temperature, temperature=0.5), plugin(TopK, k=2)], bend
    ),
    "the same without an end": Case(lambda: [plugin(Temperature, temperature=0.5), plugin(TopK, k=2)], bend, ends=()),
    "a mask whose drafts are impossible": Case(lambda: [plugin(NoDoubles, most=9)], no_doubles, new=3),
    "a transform that reads the path": Case(lambda: [plugin(Tired)], tire, ends=()),
    "first layers": Case(drafter={"layers": 1}),
    "first layers and a transform": Case(lambda: [plugin(Tired)], tire, ends=(), drafter={"layers": 2}),
    "the target itself": Case(drafter={"layers": 3}),
    "what followed before": Case(vocab=3, new=3, drafter={"drafter": "prompt_lookup"}, prompt=(1, 2, 1, 2, 1)),
    "what followed before, an end": Case(vocab=3, new=3, drafter={"drafter": "prompt_lookup"}, prompt=(1, 2, 0, 1, 2)),
    "what followed before, forbidden": Case(
        lambda: [plugin(NoDoubles, most=9)],
        no_doubles,
        new=3,
        drafter={"drafter": "prompt_lookup"},
        prompt=(2, 1, 1, 2, 1),
    ),
    "what followed before, bent": Case(
        lambda: [plugin(Temperature, temperature=0.5), plugin(TopK, k=2)],
        bend,
        drafter={"drafter": "prompt_lookup"},
        prompt=(1, 2, 2, 1, 2),
    ),
}


def pipeline(case: Case) -> Pipeline:
    drafter = case.drafter or {"model": f"other {case.vocab}"}
    return Pipeline(plugin(Rejection, length=case.length, **drafter), case.plugins())


def target(case: Case) -> dict[Text, float]:
    """Give each text's probability under the target."""
    model = TableModel(case.vocab, seed=5)
    found = enumerate_texts(
        model, case.prompt, case.new, case.ends, min_new_tokens=case.least, transform=case.transform
    )
    return {text: math.exp(logprob) for text, logprob in found.items()}


def ask(case: Case, **more: Any) -> Any:
    return request(
        pipeline(case),
        case.prompt,
        max_new_tokens=case.new,
        min_new_tokens=case.least,
        end_ids=case.ends,
        **more,
    )


@pytest.mark.parametrize("name", CASES)
def test_texts_come_exactly_as_often_as_the_target_says_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, walk = CASES[name], Walk()
    monkeypatch.setattr(module, "draw", walk.draw)
    monkeypatch.setattr(module, "accepts", walk.accepts)
    asked = ask(case)
    asked.pipeline.looks_ahead = False  # rows that will not exist would draw as well
    model = TableModel(case.vocab, seed=5)
    found: dict[Text, float] = defaultdict(float)
    for probability, result in walk.runs(lambda: alone(model, [asked], MODELS)[0]):
        [(text, reason)] = texts(result)
        assert reason == ("eos" if text[-1] in case.ends else "length")
        found[text] += probability
    expected = target(case)
    assert math.fsum(expected.values()) == pytest.approx(1, abs=1e-9)
    assert found == pytest.approx(expected, abs=1e-9)
    assert walk.judged


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_what_neither_says_is_never_accepted() -> None:
    p = torch.tensor([0.0, 0.0, 1e-300, 0.5], dtype=torch.float64)
    q = torch.tensor([0.0, 1e-320, 1e-300, 1.0], dtype=torch.float64)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert accepts(p, q, half).tolist() == [False, False, True, False]  # in the last the number is p / q itself


def test_what_is_left_has_no_mass_where_the_target_has_none() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    left = residual(p, q)
    assert left[0].tolist() == [0.5, 0.5, 0.0]  # nothing is left: p
    assert left[1].tolist() == pytest.approx([0.2, 0.3, 0.0])


def test_a_draft_model_that_is_the_target_is_always_accepted() -> None:
    case = Case(new=30, ends=(), vocab=4, length=5, drafter={"layers": 3})
    stats = [result.stats for result in alone(TableModel(4, seed=5), [ask(case, seed=seed) for seed in range(5)])]
    assert all(each.forward_passes == 5 and each.accepted == each.drafted == 25 for each in stats)


def test_under_transforms_too_since_they_bend_both_alike() -> None:
    plugins = [plugin(NoDoubles, most=30), plugin(Temperature, temperature=0.4), plugin(TopK, k=2), plugin(Tired)]
    case = Case(lambda: plugins, new=12, ends=(), vocab=4, length=5, drafter={"layers": 3})
    stats = [result.stats for result in alone(TableModel(4, seed=5), [ask(case, seed=seed) for seed in range(5)])]
    assert all(each.forward_passes == 2 and each.accepted == each.drafted == 10 for each in stats)


def test_the_length_of_drafts_depends_on_nothing_but_ends_and_limits() -> None:
    case = Case(new=12, ends=(), vocab=4, length=5, drafter={"layers": 3}, prompt=(1,))
    tight = drive(TableModel(4, seed=5), [ask(case)], Circumstances(token_budget=1, slots=60))[0]
    assert (tight.stats.forward_passes, tight.stats.drafted) == (2, 10)


# ---- real noise ------------------------------------------------------------------------------------------------------


def surprise(counts: Mapping[Any, int], expected: Mapping[Any, float]) -> float:
    """Say by how many standard deviations chi-squared is above its mean. What is rare is counted together."""
    total = sum(counts.values())
    assert counts.keys() <= expected.keys(), counts.keys() - expected.keys()
    often = [key for key, probability in expected.items() if probability * total >= 5]
    pairs = [(counts.get(key, 0), expected[key] * total) for key in often]
    rest = total - sum(count for count, _ in pairs), total - sum(mean for _, mean in pairs)
    if rest[1] >= 5:
        pairs.append(rest)
    chi = sum((count - mean) ** 2 / mean for count, mean in pairs)
    free = len(pairs) - 1
    return (chi - free) / math.sqrt(2 * free)


SEEDS, STREAMS = 30, 64


@pytest.mark.parametrize(
    "name",
    [
        "an end inside the drafts",
        "a temperature and the two likeliest",
        "a mask whose drafts are impossible",
        "ends that are banned at first",
        "first layers and a transform",
        "what followed before, an end",
    ],
)
def test_streams_and_seeds_draw_from_the_target(name: str) -> None:
    case = CASES[name]
    asked = [ask(case, seed=seed, n=STREAMS) for seed in range(SEEDS)]
    results = drive(TableModel(case.vocab, seed=5), asked, models=MODELS)
    counts = Counter(h.token_ids for result in results for h in result.hypotheses)
    assert sum(counts.values()) == SEEDS * STREAMS
    assert surprise(counts, target(case)) < 4


def test_streams_that_share_nodes_are_independent_of_each_other() -> None:
    case = Case(vocab=2, new=3, ends=(), prompt=(1, 0, 1))
    expected = target(case)
    asked = [ask(case, seed=seed, n=2) for seed in range(500)]
    results = drive(TableModel(2, seed=5), asked, models=MODELS)
    counts = Counter(tuple(h.token_ids for h in result.hypotheses) for result in results)
    pairs = {(one, other): expected[one] * expected[other] for one, other in product(expected, repeat=2)}
    assert surprise(counts, pairs) < 4


def test_what_replaces_a_draft_has_noise_of_its_own() -> None:
    p, q = (0.01, 0.1, 0.44, 0.45), (0.55, 0.03, 0.41, 0.01)
    model, draft = (TableModel(4, table={(): [math.log(each) for each in of]}) for of in (p, q))
    rejecting = Pipeline(plugin(Rejection, model="q", length=1))
    asked = [request(rejecting, max_new_tokens=1, end_ids=(), n=256, seed=seed) for seed in range(SEEDS)]
    counts = Counter(h.token_ids for result in drive(model, asked, models={"q": draft}) for h in result.hypotheses)
    assert surprise(counts, {(token,): each for token, each in enumerate(p)}) < 4


def test_noise_in_a_transform_bends_both_distributions_alike() -> None:
    case = Case(lambda: [plugin(Xtc, probability=0.5, threshold=0.2)], vocab=3, new=2, ends=())
    model = TableModel(3, seed=5)

    def excluded(logits: Tensor, out: bool) -> Tensor:
        above = logits.softmax(-1) >= 0.2
        least = logits.masked_fill(~above, math.inf).argmin()
        above[least] = False
        return logits.masked_fill(above, -math.inf) if out else logits

    expected: dict[Text, float] = defaultdict(float)
    for coins in product((False, True), repeat=2):
        come = enumerate_texts(
            model,
            case.prompt,
            2,
            (),
            transform=lambda path, logits, coins=coins: excluded(logits, coins[len(path)]),  # type: ignore[misc]
        )
        for text, logprob in come.items():
            expected[text] += math.exp(logprob) / 4
    results = drive(model, [ask(case, seed=seed, n=STREAMS) for seed in range(SEEDS)], models=MODELS)
    counts = Counter(h.token_ids for result in results for h in result.hypotheses)
    assert surprise(counts, expected) < 4


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_all_rounds_at_once_come_to_the_same(name: str) -> None:
    case = CASES[name]
    asked = [ask(case, seed=seed, n=1 + seed % 3) for seed in range(9)]
    model = TableModel(case.vocab, seed=5)
    together = drive(model, asked, models=MODELS)
    for each in asked:
        each.pipeline.looks_ahead = False
    assert [texts(result) for result in together] == [texts(result) for result in drive(model, asked, models=MODELS)]


@pytest.mark.parametrize("drafter", [{"model": "other 4"}, {"layers": 2}, {"drafter": "prompt_lookup"}])
def test_a_text_does_not_depend_on_who_else_is_there(drafter: Mapping[str, Any]) -> None:
    case = Case(vocab=4, new=7, length=3, drafter=drafter, prompt=(1, 2, 1, 2))
    model = TableModel(4, seed=5)
    asked = [ask(case, seed=seed, n=1 + seed % 2) for seed in range(3)]
    slots = least_slots(model, asked, MODELS)
    for circumstances in (
        GOOD,
        Circumstances(token_budget=2, arrivals=(0, 1, 1, 4, 2), preempts=frozenset({2, 3, 5})),
        Circumstances(slots=slots, max_running=4),
        Circumstances(slots=slots + 7, token_budget=9, preempts=frozenset({1, 4})),
    ):
        check_batch(model, asked, circumstances, MODELS)


@pytest.mark.parametrize("drafter", [{"model": "other 3"}, {"layers": 1}, {"layers": 2}, {"drafter": "prompt_lookup"}])
@pytest.mark.parametrize("looks_ahead", [True, False])
def test_a_stream_draws_the_same_however_many_there_are(drafter: Mapping[str, Any], looks_ahead: bool) -> None:
    case = Case(vocab=3, new=7, length=3, drafter=drafter, prompt=(1, 2, 1, 2))
    model, counts = TableModel(3, seed=5), (1, 2, 5)
    rejecting = pipeline(case)
    rejecting.looks_ahead = looks_ahead
    asked = [
        request(rejecting, case.prompt, max_new_tokens=case.new, end_ids=case.ends, seed=seed, n=n)
        for seed in range(16)
        for n in counts
    ]
    results = iter(drive(model, asked, models=MODELS))
    for seed in range(16):
        few: dict[int, tuple[Text, str]] = {}
        for n, result in zip(counts, results, strict=False):
            streams = {h.stream: (h.token_ids, h.finish_reason) for h in result.hypotheses}
            assert len(streams) == n
            assert few.items() <= streams.items(), f"seed {seed}, the streams of {n} and of fewer"
            few = streams


def test_a_transform_that_reads_log_probabilities_is_left_out_of_q_alone() -> None:
    case = Case(lambda: [plugin(Mirostat, tau=0.9)], vocab=4, new=12, ends=())
    results = alone(TableModel(4, seed=5), [ask(case, seed=seed) for seed in range(8)], MODELS)
    assert sum(result.stats.accepted for result in results) > 0


def test_a_neighbour_that_fails_takes_nobody_along() -> None:
    class Raises(Plugin):
        row_local = True

        @hookimpl
        def logits_transform(self, step: Step, logits: Tensor) -> None:
            if any(request.seed == 1 for request in step.requests) and bool((step.length > 2).any()):
                raise ZeroDivisionError("as it was asked to")

    case = Case(lambda: [plugin(Raises)], vocab=4, new=6, ends=())
    asked = [ask(case, seed=seed) for seed in range(3)]
    results = check_batch(TableModel(4, seed=5), asked, GOOD, MODELS)
    assert [result.error is None for result in results] == [True, False, True]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_drafter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"those of 'promptlookup' are no draws from its q: name the drafter in its"):
        Pipeline(plugin(Rejection, layers=1), [plugin(PromptLookup)])
    Pipeline(plugin(Rejection, layers=1), [plugin(Bias)])


@pytest.mark.parametrize(
    "params", [{}, {"model": "m", "drafter": "prompt_lookup"}, {"layers": 1, "drafter": "prompt_lookup"}]
)
def test_it_has_one_drafter(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="name one drafter: `model` or `layers`"):
        Rejection.Params(**params)
