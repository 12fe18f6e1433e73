"""Beam search on the real model, in float32, beside transformers' own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import unspool

NEW = 12
NEAR_TIE = 1e-4
"""Texts whose scores are closer than this may come in either order, as batches of other shapes round otherwise."""


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    from unspool.huggingface.load import local_folder

    return AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=torch.float32)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "early_stopping", "length_penalty"),
    [(2, True, 1.0), (3, False, 0.0), (4, "never", 2.0), (5, False, -1.0), (8, True, 1.0)],
)
def test_it_gives_the_texts_and_scores_of_transformers(
    engine: unspool.Engine, theirs: Any, width: int, early_stopping: Any, length_penalty: float, record_property: Any
) -> None:
    prompts = ["Name a fruit.", "What is the capital of France?"]
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    requests = [
        unspool.Request(prompt=prompt, strategy={"beam": {"width": width, **options}}, n=width, max_new_tokens=NEW)
        for prompt in prompts
    ]
    for ours in engine.run(requests, ordered=True):
        ids = torch.tensor([ours.prompt_token_ids])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        texts = [_cut(sequence, theirs.generation_config) for sequence in out.sequences[:, ids.shape[1] :].tolist()]
        scores = out.sequences_scores.tolist()
        assert [h.score for h in ours.hypotheses] == pytest.approx(scores, abs=1e-3)
        got = [h.token_ids for h in ours.hypotheses]
        if got != texts:
            gap = min(a - b for a, b in itertools.pairwise(scores))
            record_property("near_tie", gap)
            assert gap < NEAR_TIE and set(got) == set(texts)


def _cut(tokens: list[int], config: Any) -> tuple[int, ...]:
    """Cut a text after its end token: behind it there is padding."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:length])
