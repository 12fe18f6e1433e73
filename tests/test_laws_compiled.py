"""The laws on a tiny float32 network that is compiled: attention by the kernel, passes by packages.

In float32 the last bits depend on the shape of a batch, so texts are compared and scores are not; `asap`, whose weights
are sums over all its texts, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, drafters, requests, slots_for

from unspool.huggingface import HuggingFaceRunner, kernel, package
from unspool.request import Result
from unspool_testing.compare import circumstances, with_pipeline, with_plugin
from unspool_testing.compiling import untuned
from unspool_testing.driver import alone, drive
from unspool_testing.networks import tiny_model

pytestmark = [pytest.mark.skipif(kernel.compiler() is None, reason="no C++ compiler"), pytest.mark.slow]
VOCAB = 64
MADE = {name: make() for name, make in PIPELINES.items() if name != "asap"}
COMPILED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HuggingFaceRunner]:
    with untuned(tmp_path_factory.mktemp("cache")):
        runner = HuggingFaceRunner(tiny_model("llama", torch.float32))
        for kind in runner.subject.kinds:
            package.make(runner.subject, kind)
        assert runner.use_compiled()
        yield runner


@pytest.fixture(scope="module")
def draft() -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model("llama", torch.float32, seed=1))


def texts(results: list[Result]) -> list[list[tuple[int, ...]]]:
    return [[tuple(text.token_ids) for text in result.hypotheses] for result in results]


@COMPILED
@given(st.data())
def test_a_request_gives_what_it_gives_alone_whatever_the_circumstances(
    model: HuggingFaceRunner, draft: HuggingFaceRunner, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(MADE)), min_size=2, max_size=5), "pipelines")
    asked = [data.draw(requests(MADE[name], VOCAB)) for name in names]
    least = max(slots_for(one, name) for one, name in zip(asked, names, strict=True))
    among = drive(model, asked, data.draw(circumstances(len(asked), least)), {"draft": draft})
    assert texts(among) == texts(alone(model, asked, {"draft": draft}))


@COMPILED
@given(st.data())
def test_no_drafter_changes_a_text(model: HuggingFaceRunner, draft: HuggingFaceRunner, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MADE)))
    strategy = MADE[name].strategy
    able = [d for d in drafters(VOCAB) if (strategy.row_local and not strategy.holds) or d in ("chains", "trees")]
    made = drafters(VOCAB)[data.draw(st.sampled_from(able), "drafter")](data.draw(st.integers(0, 9)))
    one = data.draw(requests(MADE[name], VOCAB))
    drafting = with_plugin(MADE[name], made)
    drafted = alone(model, [with_pipeline(one, drafting)], {"draft": draft})
    assert texts(drafted) == texts(alone(model, [one], {"draft": draft}))


@COMPILED
@given(st.data())
def test_a_compiled_model_gives_the_texts_of_the_models_own_code(
    model: HuggingFaceRunner, draft: HuggingFaceRunner, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(MADE)))
    one = data.draw(requests(MADE[name], VOCAB))
    own = HuggingFaceRunner(tiny_model("llama", torch.float32), compiled=False)
    compiled, plain = (alone(runner, [one], {"draft": draft}) for runner in (model, own))
    assert texts(compiled) == texts(plain)
