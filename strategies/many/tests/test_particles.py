"""Particles: what they weigh, when they are drawn anew, how they die, and what is told of them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from unspool.errors import ConfigError, DeadEnd, PluginError
from unspool.pipeline import Pipeline, PluginSpec, build_plugin
from unspool.plugin import Plugin
from unspool.registry import Registry
from unspool.request import Result
from unspool_many.particles import Particles, Resampling, ancestors, effective_size
from unspool_sample.temperature import Temperature
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.enumeration import enumerate_texts
from unspool_testing.hosts import Bias, Fails, NoDoubles
from unspool_testing.table import TableModel

MODEL = TableModel(vocab_size=4, seed=6)
NONE = -math.inf
how_each = pytest.mark.parametrize("how", ["systematic", "stratified", "multinomial"])


def only_threes_first(request: Any, tokens: tuple[int, ...], ended: bool) -> float:
    return 0.0 if tokens[0] == 3 else NONE


def nothing(request: Any, tokens: tuple[int, ...], ended: bool) -> float:
    return NONE


def ends_are_worth_three(request: Any, tokens: tuple[int, ...], ended: bool) -> float:
    assert ended == (tokens[-1] == 0)
    return math.log(3) if ended else -0.25 * tokens[-1]


def spoilt_after_ones(request: Any, tokens: tuple[int, ...], ended: bool) -> float:
    return math.nan if request.prompt_ids == (1,) else 0.0


def particles(count: int, *plugins: Plugin, **params: Any) -> Pipeline:
    return Pipeline(plugin(Particles, particles=count, **params), list(plugins))


def run(pipeline: Pipeline, *, seed: int = 0, model: TableModel = MODEL, **fields: Any) -> Result:
    n = pipeline.strategy.params.particles
    [result] = alone(model, [request(pipeline, seed=seed, n=n, **fields)])
    return result


def model_logprob(text: tuple[int, ...], transform: Any = lambda _, logits: logits) -> float:
    total = 0.0
    for place, token in enumerate(text):
        logits = transform(text[:place], MODEL.logits_after((1, *text[:place])).clone())
        total += float(logits.log_softmax(-1)[token])
    return total


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_without_resampling_a_weight_is_what_the_model_says_over_what_the_pipeline_says(seed: int) -> None:
    result = run(particles(6, plugin(Temperature, temperature=2.0), resample_below=0.0), seed=seed)
    for hypothesis in result.hypotheses:
        text = hypothesis.token_ids
        ratio = model_logprob(text) - model_logprob(text, lambda _, logits: logits / 2)
        assert hypothesis.score == pytest.approx(ratio, abs=1e-9)
    assert result.reports["particles"]["resamplings"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_potential_telescopes_and_knows_whether_a_text_has_ended(seed: int) -> None:
    potential = f"{__name__}:ends_are_worth_three"
    bent = particles(6, plugin(Temperature, temperature=2.0), target="pipeline", potential=potential, resample_below=0)
    result = run(bent, seed=seed, max_new_tokens=3)
    for hypothesis in result.hypotheses:
        last = hypothesis.token_ids[-1]
        assert hypothesis.score == pytest.approx(math.log(3) if last == 0 else -0.25 * last)
    assert {h.finish_reason for h in result.hypotheses} == {"eos", "length"} or seed


def test_texts_come_by_weight_and_of_equal_weight_by_stream() -> None:
    result = run(particles(8, plugin(Bias, token=2, bias=2.0), resample_below=0.0), seed=1)
    keys = [(-(h.score or 0), h.stream) for h in result.hypotheses]
    assert keys == sorted(keys) and len({h.score for h in result.hypotheses}) > 3
    equal = run(particles(8, target="pipeline"), seed=1)
    assert [h.stream for h in equal.hypotheses] == list(range(8))
    assert [h.score for h in equal.hypotheses] == [0.0] * 8


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_the_report_says_what_the_weights_say(threshold: float) -> None:
    result = run(particles(8, plugin(Bias, token=2, bias=2.0), resample_below=threshold), seed=3)
    report = result.reports["particles"]
    weights = [math.exp(h.score or 0) for h in result.hypotheses]
    assert report["log_evidence"] == pytest.approx(math.log(math.fsum(weights) / 8))
    assert report["weights"] == pytest.approx([weight / math.fsum(weights) for weight in weights])
    squares = math.fsum(weight**2 for weight in report["weights"])
    assert report["effective_sample_size"] == pytest.approx(1 / squares)
    assert (report["resamplings"] > 0) == (threshold > 0)


def test_fewer_texts_come_back_than_are_told_of() -> None:
    pipeline = particles(8, plugin(Bias, token=2, bias=2.0))
    [few] = alone(MODEL, [request(pipeline, n=2)])
    everything = run(pipeline)
    assert few.hypotheses == everything.hypotheses[:2]
    assert few.reports == everything.reports


def test_a_forbidden_token_is_not_drawn_though_the_model_likes_it() -> None:
    for seed in range(5):
        result = run(particles(6, plugin(NoDoubles), resample_below=1.0), seed=seed)
        for hypothesis in result.hypotheses:
            path = (1, *hypothesis.token_ids)
            assert all(one != other for one, other in pairwise(path))


# ---- drawing anew ----------------------------------------------------------------------------------------------------


@how_each
@pytest.mark.parametrize("weights", [[0.0, -1.0, 0.5], [-3.0, -3.0], [NONE, 0.0, NONE, 1.0], [-900.0, 0.0, -900.0]])
def test_ancestors_come_as_often_as_they_weigh(how: Resampling, weights: list[float]) -> None:
    log, count, cells = torch.tensor(weights, dtype=torch.float64), 5, 400
    points = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    # One uniform number decides about one point (of `systematic` about all): all of them go through the cells together.
    counts = torch.zeros(len(weights), dtype=torch.float64)
    for point in points:
        drawn = ancestors(log, point.repeat(count), how)
        assert (drawn.diff() >= 0).all() or how == "multinomial"
        counts += torch.bincount(drawn, minlength=len(weights)) / cells
    expected = count * log.softmax(0)
    assert (counts - expected).abs().max() <= 2 * count / cells
    assert (counts[expected == 0] == 0).all()


@how_each
@pytest.mark.parametrize("u", [2.0**-53, 0.5, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize("weights", [[0.0, NONE], [NONE, 0.0], [0.0, -800.0], [-800.0, 0.0, NONE], [-1e6, -1e6, NONE]])
def test_nobody_of_weight_zero_has_children(how: Resampling, u: float, weights: list[float]) -> None:
    log = torch.tensor(weights, dtype=torch.float64)
    drawn = ancestors(log, torch.full((700,), u, dtype=torch.float64), how)
    assert (log.softmax(0)[drawn] > 0).all()


def test_systematic_ancestors_differ_from_their_share_by_less_than_one() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        log = torch.randn(9, generator=generator, dtype=torch.float64)
        u = torch.rand(9, generator=generator, dtype=torch.float64)
        counts = torch.bincount(ancestors(log, u, "systematic"), minlength=9)
        assert ((counts - 9 * log.softmax(0)).abs() < 1).all()


def test_the_effective_size_counts_equals() -> None:
    size = [effective_size(torch.tensor(w, dtype=torch.float64)) for w in ([5.0, 5.0, 5.0], [5.0, 5.0, NONE], [0.0])]
    assert size == pytest.approx([3.0, 2.0, 1.0])
    assert effective_size(torch.tensor([math.log(3), 0.0], dtype=torch.float64)) == pytest.approx(16 / 10)


@how_each
def test_after_drawing_anew_all_weigh_the_mean_and_the_sum_is_kept(how: Resampling) -> None:
    # All end at the same length, and the last token is drawn by equal weights: what is left is its own ratio.
    options: dict[str, Any] = {"end_ids": (), "max_new_tokens": 2, "seed": 2}
    bent = plugin(Bias, token=2, bias=1.5)
    before = run(particles(6, bent, resample_below=0.0), **{**options, "max_new_tokens": 1})
    after = run(particles(6, bent, resample_below=1.0, resampling=how), **options)
    assert after.reports["particles"]["resamplings"] == 1
    mean = math.fsum(math.exp(h.score or 0) for h in before.hypotheses) / 6
    for hypothesis in after.hypotheses:
        first, last = hypothesis.token_ids
        biased = MODEL.logits_after((1, first)).clone()
        biased[2] += 1.5
        ratio = float(MODEL.logits_after((1, first)).log_softmax(-1)[last] - biased.log_softmax(-1)[last])
        assert hypothesis.score == pytest.approx(math.log(mean) + ratio)


def test_children_of_one_row_draw_for_themselves() -> None:
    apart = 0
    for seed in range(10):
        result = run(particles(8, potential=f"{__name__}:only_threes_first"), seed=seed, end_ids=(), max_new_tokens=4)
        if result.error is None:
            assert sorted(h.stream for h in result.hypotheses) == list(range(8))
            texts = {h.token_ids for h in result.hypotheses}
            assert {text[0] for text in texts} == {3}
            apart += len(texts) > 1
    assert apart > 5


def test_who_has_ended_is_not_drawn_anew_and_keeps_its_weight() -> None:
    pipeline = particles(8, plugin(Bias, token=2, bias=1.0), resample_below=1.0)
    for seed in range(6):
        result = run(pipeline, seed=seed)
        ended = [h for h in result.hypotheses if len(h.token_ids) == 1]
        for hypothesis in ended:  # before anybody was drawn anew
            biased = MODEL.logits_after((1,)).clone()
            biased[2] += 1.0
            token = hypothesis.token_ids[0]
            ratio = MODEL.logits_after((1,)).log_softmax(-1)[token] - biased.log_softmax(-1)[token]
            assert hypothesis.score == pytest.approx(float(ratio))
        assert len(result.hypotheses) == 8
        assert len({h.stream for h in result.hypotheses}) == 8


# ---- death -----------------------------------------------------------------------------------------------------------


def test_the_places_of_the_dead_are_filled() -> None:
    potential = f"{__name__}:only_threes_first"
    filled = [run(particles(8, potential=potential), seed=seed) for seed in range(8)]
    left = [run(particles(8, potential=potential, resample_below=0.0), seed=seed) for seed in range(8)]
    assert [r.error is None for r in filled] == [r.error is None for r in left]
    for one, other in zip(filled, left, strict=True):
        if one.error is None:
            alive = len(other.hypotheses)
            assert len(one.hypotheses) == (8 if alive < 4 else alive)
    assert {len(r.hypotheses) for r in left if r.error is None} != {8}


def test_when_all_are_dead_the_request_is() -> None:
    result = run(particles(4, potential=f"{__name__}:nothing"))
    assert isinstance(result.error, DeadEnd)


def test_a_dead_end_of_the_pipeline_kills_its_particles_and_their_places_are_filled() -> None:
    # Whoever says 0 first can say nothing more; whoever says 2 goes on.
    model = TableModel(vocab_size=3, table={(1,): [0.0, NONE, 0.0], (0,): [NONE] * 3, (2,): [NONE, NONE, 0.0]})
    for seed in range(6):
        options: dict[str, Any] = {"seed": seed, "model": model, "end_ids": (), "max_new_tokens": 3}
        left = run(particles(8, resample_below=0.0), **options)
        filled = run(particles(8, resample_below=1.0), **options)
        alive = len(left.hypotheses)
        assert 0 < alive < 8 == len(filled.hypotheses)
        assert [h.score for h in left.hypotheses] == [0.0] * alive
        assert [h.score for h in filled.hypotheses] == pytest.approx([math.log(alive / 8)] * 8)
        assert filled.reports["particles"]["log_evidence"] == pytest.approx(math.log(alive / 8))


def test_the_deadline_ends_all_of_them_with_their_weights() -> None:
    result = run(particles(5, plugin(Bias, token=2, bias=2.0)), deadline=0.0)
    assert {h.finish_reason for h in result.hypotheses} <= {"deadline", "eos"}
    assert len({h.score for h in result.hypotheses}) > 1


def test_cancelled_particles_are_told_of() -> None:
    asked = request(particles(5, plugin(Bias, token=2, bias=2.0)), n=5, end_ids=())
    [result] = drive(MODEL, [asked], Circumstances(cancels={0: 2}))
    assert {h.finish_reason for h in result.hypotheses} == {"cancelled"}
    assert math.isfinite(result.reports["particles"]["log_evidence"])


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_potential_that_is_no_number_fails_its_own_request_alone() -> None:
    pipeline = particles(3, potential=f"{__name__}:spoilt_after_ones", resample_below=1.0)
    asked = [request(pipeline, (prompt,), n=3, end_ids=()) for prompt in (2, 1, 3)]
    results = drive(MODEL, asked)
    assert isinstance(results[1].error, PluginError) and "gave nan for the new tokens [" in str(results[1].error)
    assert [r.reports for r in results[::2]] == [r.reports for r in alone(MODEL, asked[::2])]


def test_a_neighbour_that_fails_does_not_make_it_count_twice() -> None:
    pipeline = particles(6, plugin(Bias, token=2, bias=2.0), plugin(Fails, hook="stop_check"), resample_below=1.0)
    params = {"fails": [Fails.Params(hook="stop_check", after=after) for after in (99, 1)]}
    asked = [request(pipeline, n=6, end_ids=(), parameters={"fails": own}) for own in params["fails"]]
    [one, other] = drive(MODEL, asked)
    assert other.error is not None
    [expected] = alone(MODEL, asked[:1])
    assert one.reports == expected.reports and one.hypotheses == expected.hypotheses


@pytest.mark.parametrize(("name", "value"), [("particles", 0), ("resample_below", 1.5), ("potential", "no_such")])
def test_parameters_out_of_bounds_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"particles\.{name}: "):
        build_plugin(PluginSpec("particles", {name: value}), Registry.installed(), "strategy")


# ---- the distribution ------------------------------------------------------------------------------------------------


@how_each
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_with_a_mask_weighted_texts_are_the_models_given_the_mask(how: Resampling, threshold: float) -> None:
    """Many seeds: each text's mean weight is its probability in the model, and their sum the evidence, at 5 sigma."""
    count, seeds, model = 8, 250, TableModel(vocab_size=3, seed=1)
    pipeline = particles(
        count,
        plugin(NoDoubles, most=9),
        plugin(Temperature, temperature=1.5),
        resample_below=threshold,
        resampling=how,
    )
    asked = [request(pipeline, (2,), n=count, seed=seed, max_new_tokens=4) for seed in range(seeds)]
    results = drive(model, asked, Circumstances(token_budget=4096, slots=1 << 16))
    allowed = {
        text: math.exp(logprob)
        for text, logprob in enumerate_texts(model, (2,), 4).items()
        if all(one != other for one, other in pairwise((2, *text)))
    }
    sums: list[Counter[tuple[int, ...]]] = []
    for result in results:
        weights: Counter[tuple[int, ...]] = Counter()
        for hypothesis in result.hypotheses if result.error is None else ():
            weights[hypothesis.token_ids] += math.exp(hypothesis.score or 0.0) / count  # type: ignore[assignment]
        sums.append(weights)
    assert {text for weights in sums for text in weights} <= set(allowed)
    for text, probability in [*allowed.items(), (None, math.fsum(allowed.values()))]:
        values = torch.tensor([w.total() if text is None else w[text] for w in sums], dtype=torch.float64)
        error = float(values.std()) / math.sqrt(seeds)
        assert abs(float(values.mean()) - probability) <= 5 * error + 1e-12, (text, probability)
