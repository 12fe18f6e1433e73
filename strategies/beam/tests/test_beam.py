"""Beam search is transformers' own, and what its parameters say."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from unspool.errors import InputError
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.pipeline import Pipeline
from unspool.rank import best
from unspool_beam.beam import BeamSearch
from unspool_beam.log_softmax import LogSoftmax
from unspool_greedy import Greedy
from unspool_penalties.repetition import RepetitionPenalty
from unspool_testing.driver import alone, plugin, request
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

PROMPTS = [(2, 9, 5), (2, 17), (2, 33, 4, 8), (2,)]
ENDS = [(1,), (1, 5, 9), (1,), (1, 5)]
NEW = 8


@cache
def theirs(arch: str) -> PreTrainedModel:
    return tiny_model(arch)


@cache
def ours(arch: str) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch))


def beam(*plugins: Any, **params: Any) -> Pipeline:
    return Pipeline(plugin(BeamSearch, "beam", **params), list(plugins))


def generate(model: PreTrainedModel, prompt: tuple[int, ...], ends: tuple[int, ...], **options: Any) -> Any:
    """Give transformers' texts, each with its score."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=list(ends),
            pad_token_id=0,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    texts = []
    for sequence in out.sequences.tolist():
        new = sequence[len(prompt) :]
        length = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        texts.append(tuple(new[:length]))
    return texts, out.sequences_scores.tolist()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_it_gives_the_texts_and_scores_of_transformers(
    arch: str, width: int, early_stopping: bool | Literal["never"]
) -> None:
    penalties = [-1.0, 0.0, 1.0, 2.0]
    turned = penalties[width % 4 :] + penalties[: width % 4]  # each with each, over the widths
    for penalty, ends, prompt in zip(turned, ENDS, PROMPTS, strict=True):
        options = {"length_penalty": penalty, "early_stopping": early_stopping}
        texts, scores = generate(theirs(arch), prompt, ends, num_beams=width, num_return_sequences=width, **options)
        asked = request(beam(width=width, **options), prompt, max_new_tokens=NEW, end_ids=ends, n=width)
        [result] = alone(ours(arch), [asked])
        assert [h.token_ids for h in result.hypotheses] == texts
        assert [h.score for h in result.hypotheses] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_processors_act_as_in_transformers_where_that_is_asked_for(prompt: tuple[int, ...]) -> None:
    texts, scores = generate(theirs("llama"), prompt, (1,), num_beams=4, num_return_sequences=4, repetition_penalty=1.7)
    convention = beam(plugin(LogSoftmax), plugin(RepetitionPenalty, penalty=1.7), width=4, renormalize=False)
    [result] = alone(ours("llama"), [request(convention, prompt, max_new_tokens=NEW, end_ids=(1,), n=4)])
    assert [h.token_ids for h in result.hypotheses] == texts
    assert [h.score for h in result.hypotheses] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_one_beam_is_greedy(early_stopping: bool) -> None:
    for seed in range(20):
        model = TableModel(5, seed=seed)
        one = beam(width=1, early_stopping=early_stopping)
        texts = [
            alone(model, [request(pipeline, (1, 2), max_new_tokens=7)])[0].token_ids
            for pipeline in (one, Pipeline(plugin(Greedy)))
        ]
        assert texts[0] == texts[1]


def test_the_gnmt_form_divides_by_its_own_weight() -> None:
    model = TableModel(4, seed=1)
    asked = request(beam(length_form="gnmt", length_penalty=0.6), (1,), n=4, logprobs="pipeline")
    for hypothesis in alone(model, [asked])[0].hypotheses:
        weight = ((5 + len(hypothesis.token_ids)) / 6) ** 0.6
        assert hypothesis.score == pytest.approx(sum(hypothesis.logprobs or ()) / weight)


def test_more_texts_than_beams_are_refused() -> None:
    with pytest.raises(InputError, match="at most the width of the beam, 2"):
        alone(TableModel(4), [request(beam(width=2), (1,), n=3)])


def test_sampled_beams_differ_by_seed_and_are_the_same_again() -> None:
    model, sampled = TableModel(6), beam(sample=True, width=3)
    texts = [alone(model, [request(sampled, (1,), seed=seed, n=3, end_ids=())])[0] for seed in (1, 1, 2, 3)]
    said = [[h.token_ids for h in result.hypotheses] for result in texts]
    assert said[0] == said[1]
    assert said[0] != said[2] or said[0] != said[3]


def test_the_prompt_runs_once_and_forks_copy_nothing() -> None:
    [result] = alone(TableModel(6), [request(beam(width=4), (1, 2, 3, 4, 5), max_new_tokens=6, end_ids=(), n=4)])
    assert result.stats.forward_passes == 6
    assert result.stats.rows == 5 + 5 * 4


def test_the_best_are_found_in_one_way_however_many_tie() -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (3, 8, 60):
        for levels in (1, 2, 5, 1000):
            values = torch.randint(0, levels, (9, columns), generator=generator).double()
            values[torch.rand(9, columns, generator=generator) < 0.2] = -torch.inf
            order = values.argsort(dim=-1, descending=True, stable=True)
            for count in {1, 2, columns - 1, columns}:
                assert best(values, count).tolist() == order[:, :count].tolist()


def test_of_equal_values_the_first_are_the_best() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, -torch.inf]])
    assert best(values, 2).tolist() == [[1, 2], [0, 1]]
    assert best(values, 5).tolist() == [[1, 2, 4, 3, 0], [0, 1, 2, 3, 4]]
