"""Detectors: their sums by hand, what chance gives them, and texts of the real model with and without a mark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch

import unspool
from unspool.errors import InputError
from unspool_watermark import claims
from unspool_watermark.detection import Detection, binomial_tail, normal_tail
from unspool_watermark.green_list import GreenList, GreenListDetector
from unspool_watermark.tournament import Tournament, TournamentDetector


def green(**params: Any) -> GreenListDetector:
    return GreenListDetector(GreenList.Params(**{"key": 1, **params}))


def tournament(*, weighted: bool = True, **params: Any) -> TournamentDetector:
    return TournamentDetector(Tournament.Params(**{"key": 1, **params}), weighted=weighted)


def text(length: int, vocab: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@pytest.mark.parametrize("width", [1, 3])
def test_green_tokens_are_counted_by_hand(width: int) -> None:
    params = GreenList.Params(key="k", gamma=0.3, context_width=width)
    ids = text(80, 6)
    state = claims._secret("k", "green_list")
    grams = {tuple(ids[end - width : end + 1]) for end in range(width, len(ids))}
    hits = sum(claims._chain(state, gram) / 2**64 < 0.3 for gram in grams)
    count = len(grams)
    seen = GreenListDetector(params).detect(ids)
    assert (seen.scored, seen.score, seen.expected) == (count, hits / count, 0.3)
    assert seen.z == pytest.approx((hits - 0.3 * count) / math.sqrt(count * 0.3 * 0.7))
    assert seen.p_value == pytest.approx(exact_tail(hits, count, Fraction(3, 10)))


def exact_tail(hits: int, count: int, share: Fraction) -> float:
    return float(sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1)))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("skips", [True, False])
def test_bits_are_scored_by_hand(weighted: bool, skips: bool) -> None:
    params = Tournament.Params(key="k", depth=7, context_width=2, skip_repeats=skips)
    ids, state = text(60, 4), claims._secret("k", "tournament")
    weights = [10 - 9 * layer / 6 for layer in range(7)] if weighted else [1.0] * 7
    weights = [weight * 7 / sum(weights) for weight in weights]
    met: set[tuple[int, ...]] = set()
    rows = []
    for end in range(2, len(ids)):
        mark = tuple(ids[end - 2 : end + (not skips)])
        if mark not in met:
            drawn = claims._chain(state, ids[end - 2 : end + 1])
            rows.append([drawn >> layer & 1 for layer in range(7)])
        met.add(mark)
    score = sum(weight * g for row in rows for weight, g in zip(weights, row, strict=True)) / (7 * len(rows))
    deviation = math.sqrt(len(rows) * sum(weight**2 for weight in weights) / 4) / (7 * len(rows))
    seen = TournamentDetector(params, weighted=weighted).detect(ids)
    assert (seen.scored, seen.expected) == (len(rows), 0.5)
    assert seen.score == pytest.approx(score)
    assert seen.z == pytest.approx((score - 0.5) / deviation)
    assert seen.p_value == pytest.approx(0.5 * math.erfc(seen.z / math.sqrt(2)))


@pytest.mark.parametrize("make", [green, tournament])
def test_what_is_said_again_brings_nothing_new(make: Any) -> None:
    detector, ids = make(), text(50, 1000)
    once, often = detector.detect(ids), detector.detect([*ids, *ids, *ids])
    assert often.scored == once.scored + detector.width, "only where the text meets itself are there new n-grams"
    assert detector.detect([5] * 100).scored == 1


@pytest.mark.parametrize("make", [green, tournament])
def test_the_prompt_is_context_and_is_not_judged(make: Any) -> None:
    detector, ids = make(), text(50, 1000)
    seen = detector.detect(ids[20:], before=ids[:20])
    assert seen == detector.detect(ids[20 - detector.width :])
    assert seen.scored == 30
    assert detector.detect(ids[20:]).scored == 30 - detector.width


@pytest.mark.parametrize("make", [green, tournament])
@pytest.mark.parametrize("length", [0, 1])
def test_a_text_that_is_too_short_to_judge_is_no_evidence(make: Any, length: int) -> None:
    seen = make().detect([1] * length)
    assert (seen.scored, seen.z, seen.p_value) == (0, 0.0, 1.0)


def test_text_needs_a_tokenizer() -> None:
    class Letters:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(letter) for letter in text]

    said = "so it was said"
    assert green().detect(said, tokenizer=Letters()) == green().detect([ord(letter) for letter in said])
    with pytest.raises(InputError, match="tokenizer"):
        green().detect(said)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: green(key=key),
        lambda key: green(key=key, scheme="self_hash", context_width=3),
        lambda key: tournament(key=key, context_width=1),
        lambda key: tournament(key=key, context_width=1, weighted=False, skip_repeats=False),
    ],
    ids=["left_hash", "self_hash", "tournament", "tournament, plain mean"],
)
def test_over_keys_a_plain_text_has_z_of_mean_0_and_variance_1_and_few_false_alarms(make: Any) -> None:
    ids = text(120, 12)  # few different tokens, so that n-grams come again and again
    seen: list[Detection] = [make(key).detect(ids) for key in range(1500)]
    z = torch.tensor([one.z for one in seen], dtype=torch.float64)
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z))
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / len(z))
    for rate in (0.05, 0.01):
        alarms = sum(one.p_value <= rate for one in seen) / len(seen)
        assert alarms <= rate + 5 * math.sqrt(rate / len(seen))
        assert alarms >= rate / 10, "a detector that never speaks is none"


def test_tails_are_exact() -> None:
    for hits, count, share in [(0, 5, 0.25), (5, 5, 0.25), (3, 10, 0.5), (40, 100, 0.25), (90, 100, 0.1)]:
        assert binomial_tail(hits, count, share) == pytest.approx(exact_tail(hits, count, Fraction(share)), rel=1e-9)
    assert 0 < binomial_tail(3000, 4000, 0.25) < 1e-300 or binomial_tail(3000, 4000, 0.25) == 0.0
    assert normal_tail(0) == 0.5 and normal_tail(4) == pytest.approx(3.167e-5, rel=1e-3)


# ---- the real model --------------------------------------------------------------------------------------------------

PROMPTS = ["Write a short story about a lighthouse.", "Explain how bread is made."]
Mark = tuple[str, dict[str, Any]]
MARKS: list[Mark] = [
    ("green_list", {"key": "a secret"}),
    ("green_list", {"key": "a secret", "scheme": "self_hash", "context_width": 4}),
    ("tournament", {"key": "a secret"}),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32", slots=4096) as engine:
        yield engine


@pytest.fixture(scope="module")
def texts(engine: unspool.Engine) -> dict[str, list[unspool.Result]]:
    """Write a hundred tokens for each prompt: plain ones, and with each mark."""
    requests = [
        unspool.Request(
            prompt=prompt,
            strategy="sample",
            plugins=[{mark[0]: mark[1]}] if mark else [],
            max_new_tokens=100,
            ignore_eos=True,
            seed=seed,
            id=f"{mark} {seed}",
        )
        for mark in (None, *MARKS)
        for seed, prompt in enumerate(PROMPTS)
    ]
    results = list(engine.run(requests, ordered=True))
    return {str(mark): results[2 * at : 2 * at + 2] for at, mark in enumerate((None, *MARKS))}


def detector_of(mark: Mark, **changed: Any) -> Any:
    name, params = mark
    if name == "green_list":
        return GreenListDetector(GreenList.Params(**{**params, **changed}))
    return TournamentDetector(Tournament.Params(**{**params, **changed}))


@pytest.mark.real_model
@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_a_marked_text_of_a_hundred_tokens_is_told_from_a_plain_one(
    engine: unspool.Engine, texts: dict[str, list[unspool.Result]], mark: Mark
) -> None:
    detector, other = detector_of(mark), detector_of(mark, key="another")
    for marked, plain in zip(texts[str(mark)], texts["None"], strict=True):
        assert len(marked.token_ids) == 100
        seen = detector.detect(marked.token_ids, before=marked.prompt_token_ids)
        assert seen.z > 4 and seen.p_value < 1e-4
        assert abs(other.detect(marked.token_ids, before=marked.prompt_token_ids).z) < 4, "that is another key"
        assert abs(detector.detect(plain.token_ids, before=plain.prompt_token_ids).z) < 4
        # Whoever finds the text has neither the prompt nor the tokens.
        assert detector.detect(marked.text, tokenizer=engine.tokenizer).z > 4
        assert abs(detector.detect(plain.text, tokenizer=engine.tokenizer).z) < 4


@pytest.mark.real_model
@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_a_mark_fades_as_tokens_are_replaced(texts: dict[str, list[unspool.Result]], mark: Mark) -> None:
    detector, strangers = detector_of(mark), text(100, 40_000, seed=9)
    for marked in texts[str(mark)]:
        z = []
        for kept in (100, 70, 0):
            mixed = [token if place < kept else strangers[place] for place, token in enumerate(marked.token_ids)]
            z.append(detector.detect(mixed, before=marked.prompt_token_ids).z)
        assert z[0] > z[1] > z[2] and z[1] > 3 and abs(z[2]) < 4


@pytest.mark.real_model
@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_forbidden_tokens_stay_forbidden_in_a_marked_text(engine: unspool.Engine, mark: Mark) -> None:
    name, params = mark
    strong = {"delta": 50.0} if name == "green_list" else {}
    result = engine.generate(
        PROMPTS[0],
        strategy="sample",
        plugins=["top_k:2", {name: {**params, **strong}}],
        max_new_tokens=16,
        ignore_eos=True,
        seed=1,
    )
    best = engine.score(PROMPTS[0], result.token_ids, top=2).top
    assert all(token in [t for t, _ in two] for token, two in zip(result.token_ids, best, strict=True))
    assert any(token != two[0][0] for token, two in zip(result.token_ids, best, strict=True))
