"""The laws on tiny float64 networks of real architectures, behind the runner that everybody uses."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests, slots_for

from unspool.huggingface.runner import HuggingFaceRunner
from unspool_testing.compare import check_batch, check_speculation, circumstances, with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, alone, drive, request
from unspool_testing.networks import tiny_model

VOCAB = 64
MADE = {name: make() for name, make in PIPELINES.items()}
ARCHITECTURES = ["llama", "gemma3_text", "gpt2"]
"""Full attention; sliding windows beside full attention; learned positions."""


@cache
def runner(arch: str, seed: int = 0) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch, seed=seed))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_request_gives_what_it_gives_alone_whatever_the_circumstances(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(MADE)), min_size=2, max_size=5), "pipelines")
    asked = [data.draw(requests(MADE[name], VOCAB)) for name in names]
    least = max(slots_for(one, name) for one, name in zip(asked, names, strict=True))
    model = runner(data.draw(st.sampled_from(ARCHITECTURES)))
    check_batch(model, asked, data.draw(circumstances(len(asked), least)), {"draft": runner("llama", 1)})


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_drafter_changes_a_text(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MADE)))
    strategy = MADE[name].strategy
    able = [d for d in drafters(VOCAB) if (strategy.row_local and not strategy.holds) or d in ("chains", "trees")]
    made = drafters(VOCAB)[data.draw(st.sampled_from(able), "drafter")](data.draw(st.integers(0, 9)))
    one = data.draw(requests(MADE[name], VOCAB))
    drafting = with_plugin(MADE[name], made)
    model = runner(data.draw(st.sampled_from(ARCHITECTURES)))
    bad = data.draw(circumstances(1, slots_for(with_pipeline(one, drafting), name)))
    check_speculation(model, one, MADE[name], drafting, bad, {"draft": runner("llama", 1)})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["greedy", "sample", "search", "choice", "forks", "mood"])
def test_cached_decoding_equals_running_each_text_from_scratch(name: str, arch: str) -> None:
    """The logprobs of every hypothesis are those that the model's own code gives for the whole text at once."""
    own = tiny_model(arch)
    asked = [
        request(MADE[name], (2, 9, 5, seed + 3), max_new_tokens=10, seed=seed, n=2, end_ids=(), logprobs="model")
        for seed in range(2)
    ]
    bad = Circumstances(slots=80, token_budget=6, preempts=frozenset({4, 9}))
    for circumstances_ in (Circumstances(), bad):
        for one, result in zip(asked, drive(runner(arch), asked, circumstances_), strict=True):
            for h in result.hypotheses:
                with torch.inference_mode():
                    logits = own(torch.tensor([[*one.prompt_ids, *h.token_ids]])).logits[0]
                at = len(one.prompt_ids) - 1
                expected = logits[at:-1].log_softmax(-1).gather(1, torch.tensor(h.token_ids).unsqueeze(1)).squeeze(1)
                assert h.logprobs == pytest.approx(expected.tolist(), abs=1e-9)


def test_what_is_left_in_freed_slots_is_never_seen() -> None:
    """The same slots serve one request after another, the pool being just large enough for one."""
    asked = [request(MADE["guidance"], (2, seed + 3), max_new_tokens=8, seed=seed, end_ids=()) for seed in range(5)]
    slots = max(slots_for(one, "guidance") for one in asked)
    check_batch(runner("llama"), asked, Circumstances(slots=slots))
    assert len({r.token_ids for r in alone(runner("llama"), asked)}) == 5
