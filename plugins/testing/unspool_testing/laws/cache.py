"""Law 2: packed, cached, shared decoding is the same as running every text from scratch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from unspool.request import PreparedRequest
from unspool_testing.case import Case, circumstances
from unspool_testing.compare import TOLERANCE
from unspool_testing.driver import drive
from unspool_testing.generators import beginning_alike, models, neighbours, networks, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.networks import tiny_model
from unspool_testing.subject import Subject
from unspool_testing.table import TableModel


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(st.one_of(models(), models(), models(), networks()))
    asked = draw(requests(subject, model)).model_copy(update={"logprobs": "model"})
    return Case(
        subject=subject.name,
        model=model,
        requests=draw(beginning_alike(subject, (asked, *draw(neighbours(subject, model, most=1))))),
        schedule=draw(schedules(2)),
    )


@check_of
def check_cache_equals_recompute(case: Case, known: Known) -> None:
    """Check that the model said of each text, along the run, what it says of the whole text at once."""
    runner, asked = case.model.runner(), case.prepared(known)
    results = drive(runner, asked, circumstances(case, asked), case.model.companions(), name="with the cache")
    for request, result in zip(asked, results, strict=True):
        if not lawful_end(result) or request.logprobs != "model":
            continue
        for hypothesis in result.hypotheses:
            expected = _from_scratch(case, request, hypothesis.token_ids)
            got = hypothesis.logprobs
            if got != pytest.approx(expected, abs=TOLERANCE):
                raise Broken(
                    f"request {request.id}, {list(hypothesis.token_ids)}: log-probabilities {_rounded(got or ())} with "
                    f"the cache, {_rounded(expected)} from scratch"
                )


def _from_scratch(case: Case, request: PreparedRequest, tokens: tuple[int, ...]) -> list[float]:
    prompt = request.prompt_ids
    if case.model.network is None:
        table = case.model.runner()
        assert isinstance(table, TableModel)
        rows = torch.stack([table.logits_after((*prompt, *tokens[:at])) for at in range(len(tokens))])
    else:
        network = tiny_model(case.model.network, seed=case.model.seed)
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *tokens]])
            logits: Tensor = network(ids, attention_mask=torch.ones_like(ids)).logits[0]
        rows = logits[len(prompt) - 1 : -1]
    chosen = torch.tensor(tokens).unsqueeze(1)
    values: list[float] = rows.log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
    return values


def _rounded(values: list[float] | tuple[float, ...]) -> list[float]:
    return [round(value, 6) for value in values]


CACHE_EQUALS_RECOMPUTE = Law(
    "cache_equals_recompute",
    "What the model says along a run, with one cache for all and shared prefixes, is what it says of each whole text "
    "from scratch.",
    "A slot that is read too late, or belongs to another path, shifts numbers silently: the text stays fluent and is "
    "wrong. The cache is the core's; a plugin breaks it by hanging drafts that it must not, or by keeping nodes from "
    "one step to the next.",
    check_cache_equals_recompute,
    _cases,
    examples=40,
)
