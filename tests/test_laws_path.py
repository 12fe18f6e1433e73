"""Laws 2 and 4: cached decoding is recomputing; a row is a function of its path, whatever the tree around it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests
from small_plugins import FirstLayers, Mood
from torch import Tensor

from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_testing.compare import texts, with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.hosts import Guidance, NarrowSearch
from unspool_testing.table import TableModel

VOCAB = 4
MADE = {name: make() for name, make in PIPELINES.items()}
MODELS = {"draft": TableModel(VOCAB, seed=1, memory=1)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_logprobs_of_the_model_are_those_of_running_every_prefix_from_scratch(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MADE)))
    model = TableModel(VOCAB, seed=data.draw(st.integers(0, 3)))
    one = replace(data.draw(requests(MADE[name], VOCAB)), logprobs="model")
    bad = Circumstances(
        token_budget=data.draw(st.integers(1, 20)), preempts=frozenset(data.draw(st.sets(st.integers(1, 9))))
    )
    result = drive(model, [one], bad, MODELS)[0]
    for h in result.hypotheses:
        path = one.prompt_ids
        for token, logprob in zip(h.token_ids, h.logprobs or (), strict=True):
            assert logprob == pytest.approx(model.logits_after(path).log_softmax(-1)[token].item(), abs=1e-9)
            path = (*path, token)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_score_without_a_strategys_own_is_the_sum_of_pipeline_logprobs(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["greedy", "sample", "mirostat", "grammar", "forks", "choice"]))
    one = replace(data.draw(requests(MADE[name], VOCAB)), logprobs="pipeline")
    for h in drive(TableModel(VOCAB), [one]).pop().hypotheses:
        assert h.score == pytest.approx(sum(h.logprobs or ()), abs=1e-9)


def test_nothing_scores_where_nobody_asks() -> None:
    result = alone(TableModel(VOCAB), [request(MADE["sample"], n=2)])[0]
    assert [(h.score, h.logprobs) for h in result.hypotheses] == [(None, None)] * 2


class Recorder(Plugin):
    """Remember each row as the last transform left it, by its path."""

    row_local = True
    seen: dict[tuple[int, ...], Tensor]

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        ids, lengths = step.paths()
        for path, length, row in zip(ids.tolist(), lengths.tolist(), logits, strict=True):
            before = self.seen.setdefault(tuple(path[:length]), row.clone())
            torch.testing.assert_close(row, before, atol=1e-12, rtol=0)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        ids, lengths = growth.paths()
        for path, length, row, token in zip(
            ids.tolist(), lengths.tolist(), growth.row.tolist(), growth.token.tolist(), strict=True
        ):
            parent, parent_length = (values[row] for values in step.paths())
            assert path[:length] == [*parent[: int(parent_length)].tolist(), token]


@pytest.mark.parametrize("name", [name for name in PIPELINES if "choice" not in name])
def test_a_transform_gives_the_same_row_for_the_same_path_however_the_tree_around_it_looks(name: str) -> None:
    """The same requests with all drafters in turn, with and without neighbours, under a greedy and a wide strategy."""
    model, recorder = TableModel(VOCAB), plugin(Recorder)
    assert isinstance(recorder, Recorder)
    recorder.seen = {}
    plugins = [*MADE[name].plugins[:-1], recorder]
    for strategy in (plugin(Greedy), plugin(Sample), plugin(NarrowSearch, children=3, width=4)):
        plain = Pipeline(strategy, plugins)
        for drafter in ("chains", "trees", None):
            pipeline = plain if drafter is None else with_plugin(plain, drafters(VOCAB)[drafter](3))
            asked = [request(pipeline, (1, 2), max_new_tokens=6, seed=seed, n=2) for seed in range(3)]
            drive(model, asked, Circumstances(token_budget=30, preempts=frozenset({3})), MODELS)
    assert len(recorder.seen) > 10


@pytest.mark.parametrize("plugins", [[Guidance], [FirstLayers], [Mood], [Guidance, FirstLayers, Mood]])
def test_companions_and_hidden_states_are_those_of_the_path_alone(plugins: list[type[Plugin]]) -> None:
    """The whole greedy text, recomputed by hand from the model's exact distributions."""
    model, prompt = TableModel(VOCAB), (1, 2, 3)
    pipeline = Pipeline(plugin(Greedy), [plugin(kind) for kind in plugins])
    for circumstances in (Circumstances(), Circumstances(token_budget=2), Circumstances(preempts=frozenset({2, 4}))):
        asked = request(pipeline, prompt, max_new_tokens=6, end_ids=())
        for drafter in (None, "trees", "itself"):
            made = pipeline if drafter is None else with_plugin(pipeline, drafters(VOCAB)[drafter](1))
            [(text, _)] = texts(drive(model, [with_pipeline(asked, made)], circumstances)[0])
            path: tuple[int, ...] = ()
            for token in text:
                logits = model.logits_after(prompt + path).clone()
                for kind in plugins:
                    if kind is Guidance:
                        logits += 0.7 * (logits - model.logits_after((0, 1, *path)))
                    elif kind is FirstLayers:
                        logits -= 0.5 * model.logits_after(prompt + path, layers=1)
                    else:
                        whole = prompt + path
                        states = [model.hidden_after(whole[: i + 1], 2) for i in range(len(whole))]
                        logits += 0.5 * torch.stack(states).mean(0)
                assert token == logits.argmax()
                path = (*path, token)


def test_a_shared_path_takes_one_slot_for_all_its_branches() -> None:
    used = []
    model = TableModel(VOCAB)
    greedy = request(MADE["greedy"], (1, 2, 3), n=5, max_new_tokens=4, end_ids=())
    drive(model, [greedy], watch=lambda loop: used.append(loop.main.cache.pool.size - loop.main.cache.free))
    assert used == [3, 4, 5, 0], "five equal texts are one path"
