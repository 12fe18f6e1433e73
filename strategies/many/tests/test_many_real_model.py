"""On a real model: texts are there when they are ranked, stop strings end them, and one seed gives one result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import unspool
from unspool.request import Hypothesis, PreparedRequest
from unspool_many.utilities import chrf

pytestmark = pytest.mark.real_model

PROMPT = "Name a bird."
COMMON: dict[str, Any] = {"plugins": ["temperature:1.2"], "max_new_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def drawn(engine: unspool.Engine) -> Sequence[Hypothesis]:
    return engine.generate(PROMPT, strategy="sample", n=6, logprobs="pipeline", **COMMON).hypotheses


def without_e(request: PreparedRequest, token_ids: tuple[int, ...], ended: bool) -> float:
    return -math.inf if "e" in request.tokenizer.decode(token_ids, skip_special_tokens=True) else 0.0


def test_best_of_returns_the_likeliest_sample(engine: unspool.Engine, drawn: Sequence[Hypothesis]) -> None:
    result = engine.generate(PROMPT, strategy="best_of:samples=6,scorer=logprob", **COMMON)
    scores = [math.fsum(h.logprobs or ()) for h in drawn]
    assert result.token_ids == drawn[scores.index(max(scores))].token_ids
    assert result.hypotheses[0].score == pytest.approx(max(scores), abs=1e-3)


def test_mbr_compares_texts_and_not_tokens(engine: unspool.Engine, drawn: Sequence[Hypothesis]) -> None:
    result = engine.generate(PROMPT, strategy="mbr:6", n=6, **COMMON)
    texts = [h.text for h in drawn]
    gains = [math.fsum(chrf(text, other) for other in texts) / 6 for text in texts]
    assert result.text == texts[gains.index(max(gains))]
    assert [h.score for h in result.hypotheses] == pytest.approx(sorted(gains, reverse=True))


def test_votes_are_read_out_of_texts(engine: unspool.Engine, drawn: Sequence[Hypothesis]) -> None:
    strategy = {"self_consistency": {"samples": 6, "pattern": r"\b([a-z])"}}
    result = engine.generate(PROMPT, strategy=strategy, n=6, **COMMON)
    assert {h.text for h in result.hypotheses} == {h.text for h in drawn}
    assert sum(a["votes"] for a in result.reports["self_consistency"]["answers"]) == 6
    for hypothesis in result.hypotheses[:1]:
        initials = [word[0] for word in hypothesis.text.split() if word[0].islower()]
        assert result.reports["self_consistency"]["answers"][0]["answer"] == initials[-1]


def test_a_potential_reads_texts_and_no_particle_breaks_it(engine: unspool.Engine) -> None:
    strategy = {"particles": {"particles": 12, "potential": f"{__name__}:without_e"}}
    result = engine.generate(PROMPT, strategy=strategy, n=12, **COMMON)
    assert result.hypotheses and not any("e" in h.text for h in result.hypotheses)
    assert result.reports["particles"]["log_evidence"] < 0
    again = engine.generate(PROMPT, strategy=strategy, n=12, **COMMON)
    assert again.hypotheses == result.hypotheses


def test_a_stop_string_ends_a_particle_which_keeps_its_weight(engine: unspool.Engine) -> None:
    strategy = {"particles": {"particles": 8, "target": "pipeline"}}
    result = engine.generate(PROMPT, strategy=strategy, n=8, stop=["a", "o"], **COMMON)
    assert {"stop_string"} <= {h.finish_reason for h in result.hypotheses} <= {"stop_string", "eos", "length"}
    assert not any("a" in h.text or "o" in h.text for h in result.hypotheses)
    assert [h.score for h in result.hypotheses] == [0.0] * 8
    assert result.reports["particles"]["log_evidence"] == pytest.approx(0)
