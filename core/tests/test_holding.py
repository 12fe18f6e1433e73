"""Rows that stay where they are: with drafts to look at, and with children that begin below them."""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_testing.compare import check_speculation, texts, with_plugin
from unspool_testing.drafters import GuessTrees
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.table import TableModel

MODEL = TableModel(4, seed=2)


class OneAfterAnother(Plugin):
    """From the prompt, begin a text with each token in turn; then go on with what is likeliest."""

    holds = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        row, token, stream = list[int](), list[int](), list[int]()
        requests, owns = step.request.tolist(), step.own(self)
        for each, (number, length) in enumerate(zip(requests, step.length.tolist(), strict=True)):
            begun, alone = owns[number][0], requests.count(number) == 1
            if length or alone:  # the one before has ended
                row.append(each)
                token.append(int(logits[each].argmax()) if length else begun)
                stream.append(int(step.stream[each]) if length else begun)
            if not length and begun + alone < logits.shape[1]:
                step.draft(step.node[each : each + 1], [1])
        return Growth(row=torch.tensor(row), token=torch.tensor(token), stream=torch.tensor(stream))

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        assert growth.stream is not None
        for number, stream in zip(growth.request.tolist(), growth.stream.tolist(), strict=True):
            step.own(self)[number][0] = max(step.own(self)[number][0], stream + 1)

    def open(self, request: object) -> list[int]:
        return [0]


def test_a_row_that_stays_may_have_children_time_and_again() -> None:
    pipeline = Pipeline(plugin(OneAfterAnother))
    one = request(pipeline, (3,), n=4, max_new_tokens=3, end_ids=())
    [result] = alone(MODEL, [one])
    assert sorted(tokens[0] for tokens, _ in texts(result)) == [0, 1, 2, 3]
    for tokens, _ in texts(result):
        for place in (1, 2):
            assert tokens[place] == int(MODEL.logits_after((3, *tokens[:place])).argmax())
    assert result.stats.forward_passes == 9, "the prompt, and two tokens of each text in turn"


def test_it_stays_whoever_else_is_there_and_whatever_is_guessed() -> None:
    pipeline = Pipeline(plugin(OneAfterAnother))
    one = request(pipeline, (3,), n=4, max_new_tokens=3, end_ids=())
    # A pass that only a guess would need is not made, so that guesses never cost one.
    check_speculation(MODEL, one, pipeline, with_plugin(pipeline, plugin(GuessTrees, seed=1, vocab_size=4, width=2)))
    wanted = texts(alone(MODEL, [one])[0])
    crowd = [request(pipeline, (3,), n=4, max_new_tokens=3, end_ids=(), id=str(i)) for i in range(3)]
    for slots in (12, 14, 40):
        assert [texts(result) for result in drive(MODEL, crowd, Circumstances(slots=slots))] == [wanted] * 3


class AloneOnly(OneAfterAnother):
    """The same, but it cannot bear company, and says so when it has hung its drafts."""

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        if len(step.requests) > 1:
            prompts = step.node[step.length == 0]
            step.draft(prompts, [1] * len(prompts))
            raise RuntimeError("too many")
        return super().select(step, logits)


def test_what_is_held_outlives_a_call_that_fails() -> None:
    one = request(Pipeline(plugin(OneAfterAnother)), (3,), n=4, max_new_tokens=3, end_ids=())
    wanted = texts(alone(MODEL, [one])[0])
    shy = Pipeline(plugin(AloneOnly))
    crowd = [request(shy, (3,), n=4, max_new_tokens=3, end_ids=(), id=str(i)) for i in range(3)]
    for slots in (8, 40):
        assert [texts(result) for result in drive(MODEL, crowd, Circumstances(slots=slots))] == [wanted] * 3
