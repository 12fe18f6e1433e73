"""The laws see what is wrong: each is shown a plugin that breaks it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.request import Hypothesis, PreparedRequest
from unspool.step import Step
from unspool_testing.compare import check_batch, check_speculation, with_plugin
from unspool_testing.drafters import GuessChains
from unspool_testing.driver import Circumstances, plugin, request
from unspool_testing.hosts import Likeliest
from unspool_testing.table import TableModel


class ReadsItsNeighbours(Plugin):
    """Let the mean of all rows into each."""

    row_local = True

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Break the law of batches."""
        logits -= 3 * logits.mean(0, keepdim=True)


class CountsSteps(Plugin):
    """Look at how far the step is rather than at the path."""

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Break the law of speculation."""
        logits[:, 1] += 10 * step.round


class PrefersDrafts(Plugin):
    """Choose a draft because it is there."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Break the law of speculation."""
        drafts = step.drafts()
        logits = logits.clone()
        logits[drafts.row, drafts.token] += 10
        return Growth(row=torch.arange(len(logits)), token=logits.argmax(-1))


def test_a_transform_that_reads_its_neighbours_is_caught() -> None:
    pipeline = Pipeline(plugin(Likeliest), [plugin(ReadsItsNeighbours)])
    asked = [request(pipeline, (1, i), end_ids=()) for i in range(3)]
    with pytest.raises(AssertionError, match="alone, and in"):
        check_batch(TableModel(5), asked, Circumstances())
    lawful = [request(Pipeline(plugin(Likeliest)), (1, i), end_ids=()) for i in range(3)]
    check_batch(TableModel(5), lawful, Circumstances(token_budget=2))


@pytest.mark.parametrize(("strategy", "plugins"), [(PrefersDrafts, []), (Likeliest, [CountsSteps])])
def test_what_looks_at_drafts_or_rounds_is_caught(strategy: type[Plugin], plugins: list[type[Plugin]]) -> None:
    caught = 0
    plain = Pipeline(plugin(strategy), [plugin(kind) for kind in plugins])
    for seed in range(5):
        drafting = with_plugin(plain, plugin(GuessChains, seed=seed))
        try:
            check_speculation(TableModel(5), request(plain, (1, 2), end_ids=()), plain, drafting)
        except AssertionError:
            caught += 1
    assert caught


class Gossips(Likeliest):
    """Report what no two runs have in common."""

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        return {"moments": [{"at": time.monotonic()}]}


class Recounts(Likeliest):
    """Report what depends on the text."""

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        return {"mean": sum(hypotheses[0].token_ids) / 3, "longest": None}


def test_reports_are_compared_too() -> None:
    lawful, wrong = (
        [request(Pipeline(plugin(kind)), (1, i), end_ids=()) for i in range(2)] for kind in (Recounts, Gossips)
    )
    check_batch(TableModel(5), lawful, Circumstances())
    with pytest.raises(AssertionError, match=r"reports \{'moments'"):
        check_batch(TableModel(5), wrong, Circumstances())
