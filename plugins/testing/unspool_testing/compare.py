"""Two runs compared: what a request comes to must not depend on its circumstances, or on drafts.

Give them requests on an exact model (`TableModel`, or a tiny network in float64). There they are equalities of tokens,
finish reasons, order, logprobs and reports. The named laws (`laws/`) are built on these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import PreparedRequest, Result
from unspool.runner import ModelRunner
from unspool_testing.driver import GOOD, Circumstances, Models, alone, drive

TOLERANCE = 1e-9


def check_batch(
    runner: ModelRunner,
    requests: Sequence[PreparedRequest],
    circumstances: Circumstances,
    models: Models | None = None,
) -> list[Result]:
    """Check that each request comes to what it comes to alone, whatever the circumstances. Return what they came to."""
    expected = alone(runner, requests, models)
    got = drive(runner, requests, circumstances, models, name="all together")
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        check_equal(one, other, f"request {number}, {requests[number].pipeline}: alone, and in {circumstances}")
    return got


def check_speculation(
    runner: ModelRunner,
    request: PreparedRequest,
    plain: Pipeline,
    drafting: Pipeline,
    circumstances: Circumstances = GOOD,
    models: Models | None = None,
    **parameters: Any,
) -> Result:
    """Check that a pipeline with a drafter gives what it gives without, round by round and looking ahead.

    Args:
        runner: the target.
        request: what to decode; its own pipeline is replaced.
        plain: the pipeline without the drafter.
        drafting: the same with it.
        circumstances: of the runs with the drafter.
        models: the models of companions.
        parameters: the request's own parameters of the drafter, by plugin name.

    Returns:
        The result with the drafter, round by round.
    """
    expected = alone(runner, [with_pipeline(request, plain)], models)[0]
    able = drafting.looks_ahead
    try:
        for drafting.looks_ahead in sorted({able, False}, reverse=True):
            asked = with_pipeline(request, drafting, **parameters)
            got = drive(runner, [asked], circumstances, models)[0]
            how = "looking ahead" if drafting.looks_ahead else "round by round"
            check_equal(expected, got, f"{plain} alone, and {drafting} {how}")
    finally:
        drafting.looks_ahead = able
    return got


def check_equal(one: Result, other: Result, about: str = "") -> None:
    """Check that two results agree in everything but their costs."""
    parts = difference(one, other)
    assert not parts, f"{about}: {parts}"


def difference(one: Result, other: Result) -> str | None:
    """Say in what two results differ, costs apart, or None where they are equal."""
    if repr(one.error) != repr(other.error):
        return f"{_ended(one)}, then {_ended(other)}"
    if one.error is not None:
        return None
    if texts(one) != texts(other):
        return f"{_ended(one)}, then {_ended(other)}"
    for first, second in zip(one.hypotheses, other.hypotheses, strict=True):
        text = list(first.token_ids)
        if second.score != pytest.approx(first.score, abs=TOLERANCE):
            return f"{text} has score {first.score}, then {second.score}"
        if second.logprobs != pytest.approx(first.logprobs, abs=TOLERANCE):
            return f"{text} has logprobs {first.logprobs}, then {second.logprobs}"
        if second.stream != first.stream:
            return f"{text} has stream {first.stream}, then {second.stream}"
    for name in dict.fromkeys([*one.reports, *other.reports]):
        reports = [dict(result.reports.get(name, {})) for result in (one, other)]
        if not _alike(*reports):
            return f"{name} reports {reports[0]}, then {reports[1]}"
    return None


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two values that JSON can carry are equal, numbers nearly."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(one == pytest.approx(other, abs=TOLERANCE))
    return bool(one == other)


def _ended(result: Result) -> str:
    if result.error is not None:
        return f"{type(result.error).__name__}: {result.error}"
    return " ".join(f"{list(h.token_ids)} {h.finish_reason}" for h in result.hypotheses)


def texts(result: Result) -> list[tuple[tuple[int, ...], str]]:
    """List the token ids and finish reason of each hypothesis, or raise the result's error."""
    if result.error is not None:
        raise result.error
    return [(h.token_ids, h.finish_reason) for h in result.hypotheses]


def with_pipeline(request: PreparedRequest, pipeline: Pipeline, **parameters: Any) -> PreparedRequest:
    """Give a request another pipeline; it keeps its own parameters of the plugins that it had."""
    own = {**pipeline.parameters, **{n: p for n, p in request.parameters.items() if n in pipeline.parameters}}
    return replace(request, pipeline=pipeline, parameters={**own, **parameters})


def with_plugin(pipeline: Pipeline, plugin: Plugin) -> Pipeline:
    """Give a pipeline with one plugin more, before all others."""
    return Pipeline(pipeline.strategy, [plugin, *pipeline.plugins[:-1]])


@st.composite
def circumstances(draw: st.DrawFn, requests: int, least_slots: int) -> Circumstances:
    """Draw circumstances: late arrivals, small pools, small passes, few at once, requests that lose their slots.

    Args:
        draw: of Hypothesis.
        requests: how many there are.
        least_slots: what the largest of them needs.
    """
    roomy = draw(st.booleans())
    return Circumstances(
        slots=4096 if roomy else least_slots + draw(st.integers(0, 2 * least_slots)),
        token_budget=512 if draw(st.booleans()) else draw(st.integers(1, 12)),
        max_running=draw(st.sampled_from([256, 256, 1, 2, 3])),
        arrivals=draw(st.lists(st.integers(0, 8), min_size=requests, max_size=requests)),
        preempts=frozenset(draw(st.lists(st.integers(1, 12), max_size=3))),
    )
