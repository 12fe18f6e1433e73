"""On the real model each idea gives its own text, twice the same, and each token is the one that its paper chooses.

The reference is the plain model in float32, run on whole texts; where it sees two tokens nearly equal, either is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import unspool
from unspool.huggingface.load import local_folder

pytestmark = pytest.mark.real_model

PROMPT = "Write a story about a dragon."
NEGATIVE = "Say hello."
NEW = 6
NEAR = 1e-3
LAYERS = [15, 20, 25]


@pytest.fixture(scope="module")
def engine() -> Iterator[unspool.Engine]:
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=torch.float32)


def generated(engine: unspool.Engine, strategy: Any, *plugins: Any) -> unspool.Result:
    results = [
        engine.generate(PROMPT, strategy=strategy, plugins=list(plugins), max_new_tokens=NEW, logprobs="pipeline")
        for _ in range(2)
    ]
    one, other = (result.hypotheses[0] for result in results)
    assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert one.logprobs is not None and all(-100 < value <= 0 for value in one.logprobs)
    return results[0]


def check(result: unspool.Result, scores: Any) -> None:
    """Check that each token of a result is, but for rounding, the one with the best score after those before it."""
    tokens = result.token_ids
    for place, token in enumerate(tokens):
        row = scores(tokens[:place])
        assert row[token] > row.max() - NEAR, f"new token {place} is {token}, and {int(row.argmax())} is better"


@torch.inference_mode()
def layers(model: Any, path: list[int]) -> list[Tensor]:
    """Give the hidden states of all layers for the whole path: `[length, width]` each."""
    out = model(torch.tensor([path]), use_cache=False, output_hidden_states=True)
    return [hidden[0] for hidden in out.hidden_states]


@torch.inference_mode()
def logprobs(model: Any, hidden: Tensor, *, norm: bool = False) -> Tensor:
    row: Tensor = model.lm_head(model.model.norm(hidden) if norm else hidden)
    return row.log_softmax(-1)


def test_contrastive_search_is_what_its_paper_chooses(engine: unspool.Engine, model: Any) -> None:
    result = generated(engine, {"contrastive_search": {"top_k": 4, "alpha": 0.6}})

    def scores(text: tuple[int, ...]) -> Tensor:
        path = [*result.prompt_token_ids, *text]
        before = layers(model, path)[-1]
        probability = logprobs(model, before[-1]).exp()
        row = torch.full_like(probability, -torch.inf)
        best = probability.topk(4).indices
        with torch.inference_mode():
            out = model(torch.tensor([[*path, token] for token in best.tolist()]), output_hidden_states=True)
        for token, hidden in zip(best, out.hidden_states[-1][:, -1], strict=True):
            row[token] = 0.4 * probability[token] - 0.6 * torch.cosine_similarity(hidden, before).max()
        return row

    check(result, scores)
    assert result.token_ids != generated(engine, "greedy").token_ids
    stats = result.stats
    assert stats.forward_passes == 1 + NEW and stats.rows == stats.prompt_tokens - stats.cached_tokens + 4 * NEW


def contrasted(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p - log_q).masked_fill(log_p < log_p.max() + torch.tensor(0.1).log(), -torch.inf)


def test_dola_is_what_its_paper_chooses(engine: unspool.Engine, model: Any) -> None:
    result = generated(engine, "greedy", {"dola": LAYERS})

    def scores(text: tuple[int, ...]) -> Tensor:
        found = [hidden[-1] for hidden in layers(model, [*result.prompt_token_ids, *text])]
        final, early = logprobs(model, found[-1]), [logprobs(model, found[layer], norm=True) for layer in LAYERS]
        means = [(final.exp() + row.exp()) / 2 for row in early]
        distances = [
            sum(float((row.exp() * (row - mean.log())).sum()) for row in (final, other))
            for other, mean in zip(early, means, strict=True)
        ]
        return contrasted(final, early[max(range(len(early)), key=distances.__getitem__)])

    check(result, scores)


def test_contrastive_decoding_is_what_its_paper_chooses(engine: unspool.Engine, model: Any) -> None:
    result = generated(engine, "greedy", {"contrastive_decoding": {"layers": 20}})

    def scores(text: tuple[int, ...]) -> Tensor:
        found = [hidden[-1] for hidden in layers(model, [*result.prompt_token_ids, *text])]
        return contrasted(logprobs(model, found[-1]), logprobs(model, found[20], norm=True))

    check(result, scores)


@pytest.mark.parametrize("messages", [False, True])
def test_guidance_equals_generate_of_transformers(engine: unspool.Engine, model: Any, messages: bool) -> None:
    negative = [{"role": "user", "content": NEGATIVE}] if messages else NEGATIVE
    result = generated(engine, "greedy", {"guidance": {"scale": 2.0, "negative_prompt": negative}})
    ids = torch.tensor([result.prompt_token_ids])
    other = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": NEGATIVE}], add_generation_prompt=True, return_dict=False
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        guidance_scale=2.0,
        negative_prompt_ids=torch.tensor([other]),
        do_sample=False,
        max_new_tokens=NEW,
    )
    assert list(result.token_ids) == out[0, ids.shape[1] :].tolist()
