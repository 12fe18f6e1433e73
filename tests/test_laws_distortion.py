"""What a mask bends: texts come as if the model had never wanted to say what is forbidden. Particles and ASAp undo it.

All that a language allows is written out with its probability under the model alone. That, made to add up to 1, is what
a constrained model should say. Every outcome of a strategy's draws is walked, so what it says in truth is a sum.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool.errors import DeadEnd
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.request import PreparedRequest, Result
from unspool.step import Step
from unspool_constrained.choices import Choices
from unspool_constrained.grammar import ContextFree
from unspool_many import asap, particles
from unspool_many.asap import ASAp, Beginning, Known
from unspool_many.particles import Particles
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, plugin, request
from unspool_testing.letters import tokenizer_of
from unspool_testing.table import TableModel
from unspool_testing.walk import Walk

TOKENS = ["<end>", "0", "1", "01"]
TOKENIZER = tokenizer_of(TOKENS, ["<end>"])
PROMPT = (1, 2)
DATA = Path(os.environ.get("UNSPOOL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "grammars" / "asap"

Text = tuple[int, ...]

languages = st.sets(st.text("01", min_size=1, max_size=3), min_size=2, max_size=4).map(sorted)
models = st.builds(lambda seed: TableModel(len(TOKENS), seed=seed, spread=4.0), st.integers(0, 10**6))


def asked(strategy: Plugin, language: list[str], **fields: Any) -> PreparedRequest:
    return request(
        Pipeline(strategy, [plugin(Choices, choices=language)]),
        PROMPT,
        tokenizer=TOKENIZER,
        max_new_tokens=8,
        **fields,
    )


def allowed(language: list[str], said: str) -> list[int]:
    """List the tokens that may follow; nothing where the text must end."""
    longer = [each for each in language if each.startswith(said) and each != said]
    ends = [0] if said in language and longer else []
    return ends + [t for t in range(1, len(TOKENS)) if any(each.startswith(said + TOKENS[t]) for each in language)]


def written_out(model: TableModel, language: list[str]) -> tuple[dict[Text, float], dict[Text, float]]:
    """Give the probability of every allowed text: under the model alone, and under plain masking."""
    alone_, masked = {}, {}
    stack: list[tuple[Text, float, float]] = [((), 1.0, 1.0)]
    while stack:
        path, p, q = stack.pop()
        chances = model.logits_after((*PROMPT, *path)).softmax(-1).tolist()
        follow = allowed(language, "".join(TOKENS[t] for t in path))
        mass = math.fsum(chances[t] for t in follow)
        for t in follow:
            text = (*path, t), p * chances[t], q * chances[t] / mass
            said = "".join(TOKENS[t] for t in text[0] if t)
            if t == 0 or not allowed(language, said):
                alone_[text[0]], masked[text[0]] = text[1:]
            else:
                stack.append(text)
    return alone_, masked


def shared_out(weights: Mapping[Text, float]) -> dict[Text, float]:
    total = math.fsum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def distance(one: Mapping[Text, float], other: Mapping[Text, float]) -> float:
    """Give the total variation: by how much the chance of anything may differ."""
    return 0.5 * math.fsum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other})


def drawn(model: TableModel, one: PreparedRequest, monkeypatch: pytest.MonkeyPatch) -> dict[Text, float]:
    """Give the chance of each first text, over all ways that draws can go."""
    walk, chances = Walk(), defaultdict[Text, float](float)
    with monkeypatch.context() as patch:
        patch.setattr(asap, "draw", walk.draw)
        for chance, result in walk.runs(lambda: said(model, one)):
            chances[result.token_ids] += chance
    return chances


def said(model: TableModel, one: PreparedRequest) -> Result:
    [result] = alone(model, [one])
    assert result.error is None, result.error
    return result


@settings(max_examples=30, deadline=None)
@given(models, languages, st.integers(0, 2**40))
def test_a_first_sample_is_what_plain_masking_draws(model: TableModel, language: list[str], seed: int) -> None:
    first, plain = (asked(kind, language, seed=seed) for kind in (plugin(ASAp, samples=1), plugin(Sample)))
    assert said(model, first).token_ids == said(model, plain).token_ids
    walked = drawn(model, first, pytest.MonkeyPatch())
    assert walked == pytest.approx(written_out(model, language)[1], abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(models, languages)
def test_particles_weigh_each_text_as_the_model_does(model: TableModel, language: list[str]) -> None:
    truth, _ = written_out(model, language)
    one = asked(plugin(Particles, particles=2, resample_below=0.0), language, n=2)
    walk, mean = Walk(), defaultdict[Text, float](float)
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(particles, "draw", walk.draw)
        for chance, result in walk.runs(lambda: said(model, one)):
            for hypothesis in result.hypotheses:
                assert hypothesis.score is not None
                mean[hypothesis.token_ids] += chance * math.exp(hypothesis.score) / 2
    assert mean == pytest.approx(truth, abs=1e-9)


class Watched(ASAp):
    """ASAp, and what it knows in the end."""

    known: Known

    def open(self, request: PreparedRequest) -> Known:
        type(self).known = super().open(request)
        return type(self).known


def futures(model: TableModel, language: list[str], path: Text = ()) -> float:
    """Give the chance that the model, left alone, keeps to the language from a beginning on."""
    truth, _ = written_out(model, language)
    below = math.fsum(chance for text, chance in truth.items() if text[: len(path)] == path)
    for place, token in enumerate(path):
        below /= float(model.logits_after((*PROMPT, *path[:place])).softmax(-1)[token])
    return below


@settings(max_examples=25, deadline=None)
@given(models, languages, st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**40))
def test_a_future_is_never_too_small_and_only_falls(
    model: TableModel, language: list[str], samples: int, together: int, seed: int
) -> None:
    evidence = []
    for count in (samples, 2 * samples):  # with the same seed the first samples are the same
        said(model, asked(plugin(Watched, samples=count, together=together), language, seed=seed))
        stack: list[tuple[Text, Beginning]] = [((), Watched.known.root)]
        while stack:
            path, here = stack.pop()
            assert here.future >= futures(model, language, path) - 1e-12
            stack += [((*path, token), after) for token, (_, after) in here.below.items() if token]
        evidence.append(Watched.known.root.future)
    assert evidence[1] <= evidence[0] + 1e-12


def next_sample(model: TableModel, language: list[str], known: Known) -> dict[Text, float]:
    """Give the chance of each text that is drawn with what is known."""
    chances: dict[Text, float] = {}
    stack: list[tuple[Text, float, Any]] = [((), 1.0, known.root)]
    while stack:
        path, chance, here = stack.pop()
        follow = allowed(language, "".join(TOKENS[t] for t in path))
        p = model.logits_after((*PROMPT, *path)).softmax(-1).tolist()
        below = {t: here.below.get(t, (0.0, None))[1] if here else None for t in follow}
        weights = {t: p[t] * (after.future if after else 1.0) for t, after in below.items()}
        for t, weight in weights.items():
            text, so_far = (*path, t), chance * weight / math.fsum(weights.values())
            if t == 0 or not allowed(language, "".join(TOKENS[t] for t in text)):
                chances[text] = so_far
            else:
                stack.append((text, so_far, below[t]))
    return chances


def check_learned(model: TableModel, one: PreparedRequest, language: list[str]) -> float:
    """Check that after many samples the next comes as the model writes, and give how far plain masking is from that."""
    truth, masked = written_out(model, language)
    said(model, one)
    after, wanted = next_sample(model, language, Watched.known), shared_out(truth)
    bent = distance(masked, wanted)
    assert distance(after, wanted) <= 1e-9 + 0.02 * bent
    assert Watched.known.root.future == pytest.approx(math.fsum(truth.values()), rel=0.01)
    return bent


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), languages)
def test_after_many_samples_texts_come_as_the_model_writes_them(seed: int, language: list[str]) -> None:
    one = asked(plugin(Watched, samples=150, together=5), language, seed=1)
    check_learned(TableModel(len(TOKENS), seed=seed, spread=1.0), one, language)


CROOKED = TableModel(len(TOKENS), table={(): [0, 0, 0, -9], (1, 2, 1): [0, 3, -3, -9]})
"""After a 0 it goes on with 0, which the language below forbids: a mask never lets it see that."""


def test_the_distortion_of_plain_masking_is_large_and_goes_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    language = ["01", "10", "11"]
    truth, masked = (shared_out(texts) for texts in written_out(CROOKED, language))
    distances = [
        distance(drawn(CROOKED, asked(plugin(ASAp, samples=n), language), monkeypatch), truth) for n in (1, 2, 3)
    ]
    assert distances[0] == pytest.approx(distance(masked, truth)) and distances[0] > 0.25
    assert all(later < earlier for earlier, later in pairwise(distances))


@pytest.mark.skipif(not DATA.is_dir(), reason="UNSPOOL_TEST_DATA names no folder")
@pytest.mark.parametrize("name", ["binary_len_3", "binary_len_5_0", "binary_len_5_1"])
def test_on_the_grammars_of_the_paper(name: str) -> None:
    grammar = (DATA / f"{name}.ebnf").read_text(encoding="utf-8")
    words = re.findall(r'"([01]+)"', grammar)
    language = ["000", "100", "101", "110", "111"] if name == "binary_len_3" else words
    pipe = Pipeline(plugin(Watched, samples=250, together=5), [plugin(ContextFree, grammar=grammar)])
    # Bits come mostly as they came before, and a text that leaves its grammar does so late: after a good beginning.
    model = TableModel(len(TOKENS), table={(): [-9, 0, 0, -9], (1,): [-9, 1, 0, -9], (1, 1): [-9, 1.5, 0, -9]})
    one = request(pipe, PROMPT, tokenizer=TOKENIZER, max_new_tokens=8, seed=1)
    assert check_learned(model, one, language) > 0.02


def test_a_sample_that_comes_to_a_dead_end_is_not_tried_again() -> None:
    class NothingAfterTwo(Plugin):
        constraint = True

        @hookimpl
        def logits_transform(self, step: Step, logits: Tensor) -> None:
            paths, lengths = step.paths()
            for row, (path, length) in enumerate(zip(paths.tolist(), lengths.tolist(), strict=True)):
                logits[row, slice(None) if path[length - 1] == 2 else 0] = -torch.inf

    model = TableModel(3, table={(): [0.0, 0.0, 5.0]})
    pipe = Pipeline(plugin(ASAp, samples=6), [plugin(NothingAfterTwo)])
    [result] = alone(model, [request(pipe, (1,), n=6, max_new_tokens=3)])
    assert [h.token_ids[:2] for h in result.hypotheses] == [(1, 1)] * 4, "nobody goes where a 2 has led"
    assert result.reports["asap"]["log_evidence_at_most"] < -9


def test_where_every_beginning_leads_to_a_dead_end_it_gives_up() -> None:
    class NothingSecond(Plugin):
        constraint = True

        @hookimpl
        def logits_transform(self, step: Step, logits: Tensor) -> None:
            logits[step.length == 1] = -torch.inf

    pipe = Pipeline(plugin(ASAp, samples=9), [plugin(NothingSecond)])
    [result] = alone(TableModel(3), [request(pipe, (1,), n=6, end_ids=(), max_new_tokens=4)])
    assert isinstance(result.error, DeadEnd)
