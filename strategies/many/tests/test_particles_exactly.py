"""Unbiased, exactly: every outcome of the algorithm's own random numbers is walked, with its probability.

The strategy runs as it is, in the real loop. Only where it draws, a token for a particle or ancestors, the numbers come
from here: one outcome after another. So expectations are sums, and equal what is claimed to the last digits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.errors import DeadEnd
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool_many import particles as module
from unspool_many.particles import Particles, Resampling
from unspool_sample.temperature import Temperature
from unspool_testing import walk as walks
from unspool_testing.driver import alone, plugin, request
from unspool_testing.enumeration import enumerate_texts
from unspool_testing.hosts import Bias, NoDoubles
from unspool_testing.table import TableModel

Text = tuple[int, ...]
REAL_ANCESTORS = module.ancestors


class Walk(walks.Walk):
    """All ways that draws of tokens and of ancestors can go."""

    def draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        assert len(set(keys.tolist())) == len(keys), "each particle draws for itself"
        return super().draw(logits, keys)

    def ancestors(self, weights: Tensor, uniform: Tensor, how: Resampling) -> Tensor:
        """Let the real function draw, with a number from each piece of (0, 1) on which its answer is the same."""
        count = len(uniform)
        edges = [0.0, *weights.softmax(0).cumsum(0).tolist()]
        numbers: list[float] = []
        for place in range(count):
            if how == "systematic" and place:
                numbers.append(numbers[0])
                continue
            cuts = {
                "multinomial": edges,
                "stratified": [edge * count - place for edge in edges],
                "systematic": [edge * count - other for edge in edges for other in range(count)],
            }[how]
            inner = sorted({round(cut, 12) for cut in cuts if 1e-12 < cut < 1 - 1e-12})
            bounds = [0.0, *inner, 1.0]
            pieces = list(pairwise(bounds))
            low, high = pieces[self.choose([high - low for low, high in pieces])]
            numbers.append((low + high) / 2)
        return REAL_ANCESTORS(weights, torch.tensor(numbers, dtype=torch.float64), how)


def likes_twos(request: Any, tokens: Text, ended: bool) -> float:
    """Weigh beginnings otherwise than whole texts, and forbid some."""
    if tokens[:2] == (1, 1):
        return -math.inf
    return 0.7 * tokens.count(2) - (0.4 if ended else 0.0)


@dataclass(frozen=True)
class Case:
    """A pipeline on a small table."""

    plugins: Callable[[], list[Plugin]]
    params: dict[str, Any] = field(default_factory=dict)
    count: int = 2
    vocab: int = 3
    new: int = 2
    ends: Text = (0,)
    threshold: float = 1.0


CASES = {
    "a bias, and a threshold": Case(lambda: [plugin(Bias, token=2, bias=3.0)], threshold=0.8),
    "a temperature and no end": Case(lambda: [plugin(Temperature, temperature=3.0)], vocab=2, new=3, ends=()),
    "a mask": Case(lambda: [plugin(NoDoubles, most=9)], new=3, ends=()),
    "a mask and a temperature, three particles": Case(
        lambda: [plugin(NoDoubles, most=9), plugin(Temperature, temperature=3.0)], count=3, ends=()
    ),
    "a potential": Case(list, {"potential": f"{__name__}:likes_twos"}),
    "a potential on a temperature": Case(
        lambda: [plugin(Temperature, temperature=2.0)], {"potential": f"{__name__}:likes_twos"}
    ),
    "a potential of the pipeline": Case(
        lambda: [plugin(Bias, token=2, bias=1.0)], {"potential": f"{__name__}:likes_twos", "target": "pipeline"}
    ),
}
PROMPT = (1,)


def target(model: TableModel, case: Case) -> dict[Text, float]:
    """Give what a text's weight should be in the mean, from its definition."""
    names = {p.name: p.params for p in case.plugins()}
    bent = case.params.get("target") == "pipeline"

    def transform(path: Text, logits: Tensor) -> Tensor:
        if "nodoubles" in names:
            logits[(*PROMPT, *path)[-1]] = -math.inf
        if bent:
            logits[names["bias"].token] += names["bias"].bias
        return logits

    weights = {}
    for text in enumerate_texts(model, PROMPT, case.new, case.ends, transform=transform):
        logprob = 0.0
        for place, token in enumerate(text):
            logits = model.logits_after((*PROMPT, *text[:place])).clone()
            logprob += float((transform(text[:place], logits) if bent else logits).log_softmax(-1)[token])
        extra = likes_twos(None, text, text[-1] in case.ends) if "potential" in case.params else 0.0
        weights[text] = math.exp(logprob + extra)
    return {text: weight for text, weight in weights.items() if weight}


@pytest.mark.parametrize("how", ["systematic", "stratified", "multinomial", "never"])
@pytest.mark.parametrize("name", CASES)
def test_every_texts_weight_is_right_in_the_mean(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, walk = CASES[name], Walk()
    model = TableModel(case.vocab, seed=5)
    monkeypatch.setattr(module, "draw", walk.draw)
    monkeypatch.setattr(module, "ancestors", walk.ancestors)
    again = {"resample_below": 0.0} if how == "never" else {"resample_below": case.threshold, "resampling": how}
    strategy = plugin(Particles, particles=case.count, **case.params, **again)
    asked = request(
        Pipeline(strategy, case.plugins()), PROMPT, n=case.count, max_new_tokens=case.new, end_ids=case.ends
    )
    mean: dict[Text, float] = defaultdict(float)
    evidence = total = resamplings = 0.0
    for probability, result in walk.runs(lambda: alone(model, [asked])[0]):
        total += probability
        if result.error is not None:
            assert isinstance(result.error, DeadEnd)
            continue
        report = result.reports["particles"]
        evidence += probability * math.exp(report["log_evidence"])
        resamplings += probability * report["resamplings"]
        for hypothesis in result.hypotheses:
            assert hypothesis.score is not None
            mean[hypothesis.token_ids] += probability * math.exp(hypothesis.score) / case.count
    expected = target(model, case)
    assert total == pytest.approx(1, abs=1e-9)
    assert mean == pytest.approx(expected, abs=1e-9)
    assert evidence == pytest.approx(math.fsum(expected.values()), abs=1e-9)
    assert (resamplings > 0.01) == (how != "never")
