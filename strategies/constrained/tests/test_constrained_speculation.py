"""Under every strategy, constrained texts are what brute force finds, and drafts of any kind change none of them."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Result
from unspool_beam.beam import BeamSearch
from unspool_constrained.choices import Choices
from unspool_constrained.constraint import Constraint
from unspool_constrained.grammar import ContextFree
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.regex import Regex
from unspool_contrastive.search import ContrastiveSearch
from unspool_greedy import Greedy
from unspool_many.particles import Particles
from unspool_sample.sample import Sample
from unspool_testing.compare import check_speculation, with_plugin
from unspool_testing.drafters import GuessChains, GuessTrees, Recall
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.letters import tokenizer_of
from unspool_testing.table import TableModel

TOKENS = ["<end>", "a", "b", "ab", '"', '"a', "ba"]
TOKENIZER = tokenizer_of(TOKENS, ["<end>"])
SIZE = len(TOKENS)
STRATEGIES: dict[str, tuple[type[Plugin], dict[str, Any]]] = {
    "greedy": (Greedy, {}),
    "sample": (Sample, {}),
    "beam": (BeamSearch, {"width": 3}),
    "contrastive": (ContrastiveSearch, {"top_k": 3, "alpha": 0.5}),
    "particles": (Particles, {"particles": 4}),
}
LANGUAGES: dict[str, tuple[type[Constraint], dict[str, Any], str]] = {
    "regex": (Regex, {"pattern": "(ab)+a?"}, "(ab)+a?"),
    "choices": (Choices, {"choices": ["abab", "aba", "b"]}, "abab|aba|b"),
    "schema": (JsonSchema, {"schema": {"enum": ["a", "ab", "bba"]}}, '"(a|ab|bba)"'),
    "grammar": (
        ContextFree,
        {"grammar": 'start: "a" start "b" | "ab"'},
        "|".join(n * "a" + n * "b" for n in range(1, 11)),
    ),
}


def pipeline(strategy: str, language: str, **params: Any) -> Pipeline:
    kind, settings_ = STRATEGIES[strategy]
    constraint, own, _ = LANGUAGES[language]
    return Pipeline(plugin(kind, **settings_), [plugin(constraint, **own, **params)])


def asked(pipe: Pipeline, seed: int = 0, **fields: Any) -> Any:
    options = {"max_new_tokens": 8, "n": 1, **fields}
    return request(pipe, (1, 2), seed=seed, tokenizer=TOKENIZER, **options)


def text(tokens: tuple[int, ...]) -> str:
    return "".join(TOKENS[token] for token in tokens if token)


def check_language(result: Result, regex: str) -> None:
    import regex as partial  # type: ignore[import-untyped]

    for hypothesis in result.hypotheses:
        said = text(hypothesis.token_ids)
        if hypothesis.finish_reason in ("eos", "grammar_end"):
            assert re.fullmatch(regex, said), said
        else:
            assert partial.fullmatch(regex, said, partial=True), said


def language_of(regex: str, most: int) -> list[tuple[int, ...]]:
    """List all token sequences whose text is in the language, each with the end that it gets."""
    texts = (tokens for length in range(1, most + 1) for tokens in product(range(1, SIZE), repeat=length))
    return [tokens for tokens in texts if re.fullmatch(regex, text(tokens))]


@pytest.mark.parametrize("language", ["choices", "schema"])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_likeliest_text_of_the_language(language: str, seed: int) -> None:
    model = TableModel(SIZE, seed=seed)
    kind, own, regex = LANGUAGES[language]
    pipe = Pipeline(plugin(BeamSearch, width=400, length_penalty=0.0), [plugin(kind, **own)])
    [result] = alone(model, [asked(pipe, max_new_tokens=6)])
    best, score = brute_force(model, regex)
    assert text(result.token_ids) == text(best)
    assert result.hypotheses[0].score == pytest.approx(score)


def brute_force(model: TableModel, regex: str) -> tuple[tuple[int, ...], float]:
    """Score every text of a finite language in the distribution that the constraint leaves."""
    import regex as partial

    def row(tokens: tuple[int, ...]) -> torch.Tensor:
        logits = model.logits_after((1, 2, *tokens)).clone()
        for token in range(1, SIZE):
            if not partial.fullmatch(regex, text((*tokens, token)), partial=True):
                logits[token] = -torch.inf
        if not re.fullmatch(regex, text(tokens)):
            logits[0] = -torch.inf
        return logits.log_softmax(-1)

    scored = {}
    for tokens in language_of(regex, 5):
        total = sum(float(row(tokens[:place])[token]) for place, token in enumerate(tokens))
        goes_on = any(partial.fullmatch(regex, text((*tokens, t)), partial=True) for t in range(1, SIZE))
        scored[tokens] = total + (float(row(tokens)[0]) if goes_on else 0.0)
    best = max(scored, key=lambda tokens: scored[tokens])
    return best, scored[best]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from(sorted(STRATEGIES)), st.sampled_from(sorted(LANGUAGES)), st.integers(1, 9))
def test_no_draft_changes_a_text_and_every_text_is_in_the_language(
    seed: int, strategy: str, language: str, most: int
) -> None:
    model = TableModel(SIZE, seed=seed % 5)
    plain = pipeline(strategy, language, draft_forced=False)
    ends = [(0,), (), (0, 2)][seed % 3]
    one = asked(plain, seed, max_new_tokens=most, end_ids=ends)
    known = alone(model, [one])[0]
    check_language(known, LANGUAGES[language][2] if ends != (0, 2) else f"({LANGUAGES[language][2]})b?")
    forced = pipeline(strategy, language)
    check_speculation(model, one, plain, forced)
    texts = tuple((*h.token_ids, 0, 1) for h in known.hypotheses)
    for drafter, own in (
        (plugin(GuessChains, length=4, vocab_size=SIZE, seed=seed), {}),
        (plugin(GuessTrees, width=3, depth=3, vocab_size=SIZE, seed=seed), {}),
        (plugin(Recall), {"recall": Recall.Params(texts=texts)}),
    ):
        check_speculation(model, one, plain, with_plugin(forced, drafter), Circumstances(token_budget=32), None, **own)


def test_greedy_takes_the_best_token_that_the_language_allows() -> None:
    model = TableModel(SIZE, seed=2)
    [result] = alone(model, [asked(pipeline("greedy", "choices"))])
    tokens: tuple[int, ...] = ()
    while result.token_ids[len(tokens) :]:
        row = model.logits_after((1, 2, *tokens))
        allowed = [t for t in range(1, SIZE) if any(c.startswith(text((*tokens, t))) for c in ("abab", "aba", "b"))]
        ends = [0] if text(tokens) in ("abab", "aba", "b") else []
        tokens = (*tokens, max([*ends, *allowed], key=lambda t: float(row[t])))
    assert tokens == result.token_ids


def test_samples_follow_the_renormalised_distribution() -> None:
    model = TableModel(SIZE, seed=1)
    pipe = Pipeline(plugin(Sample), [plugin(Choices, choices=["a", "b", "ab"])])
    results = alone(model, [asked(pipe, seed, max_new_tokens=1, end_ids=()) for seed in range(600)])
    counts = torch.zeros(SIZE)
    for result in results:
        counts[result.token_ids[0]] += 1
    row = model.logits_after((1, 2)).clone()
    row[[0, 4, 5, 6]] = -torch.inf
    assert torch.allclose(counts / 600, row.softmax(-1).float(), atol=0.06)


def test_forced_text_costs_one_pass_but_for_a_last_token_that_could_be_longer() -> None:
    pipe = Pipeline(plugin(Greedy), [plugin(Regex, pattern="a{12}b?")])
    table: dict[tuple[int, ...], list[float]] = {(): [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]}
    [result] = alone(TableModel(SIZE, table=table), [asked(pipe, max_new_tokens=20)])
    assert text(result.token_ids) == "a" * 12
    assert (result.stats.forward_passes, result.stats.accepted) == (2, 11)


def test_batches_and_preemption_change_nothing() -> None:
    model = TableModel(SIZE, seed=3)
    pipes = [pipeline(strategy, language) for strategy in STRATEGIES for language in LANGUAGES]
    requests = [asked(pipe, seed, max_new_tokens=7) for seed, pipe in enumerate(pipes)]
    expected = alone(model, requests)
    for preempts in (frozenset(), frozenset({2, 3, 5})):
        got = drive(model, requests, Circumstances(token_budget=64, preempts=preempts))
        for one, other in zip(expected, got, strict=True):
            assert [h.token_ids for h in one.hypotheses] == [h.token_ids for h in other.hypotheses]
            assert one.reports == other.reports
