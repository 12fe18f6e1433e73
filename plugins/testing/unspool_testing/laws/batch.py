"""Law 1: a request's output does not depend on what else is in the batch, on arrival, on slots, or on preemption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from unspool.errors import ConfigError
from unspool.plugin import Plugin, per_request_fields
from unspool.request import PreparedRequest, Result
from unspool_testing.case import Asked, Case, Model, circumstances
from unspool_testing.compare import difference
from unspool_testing.driver import alone, drive
from unspool_testing.generators import beginning_alike, models, neighbours, requests, schedules
from unspool_testing.known import Known, Spec
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.parameters import parameters
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    first = draw(requests(subject, model))
    count = draw(st.integers(0, 2))
    others = [draw(requests(subject, model, pipeline=draw(siblings(subject, model, first)))) for _ in range(count)]
    asked = draw(beginning_alike(subject, (first, *others, *draw(neighbours(subject, model)))))
    return Case(subject=subject.name, model=model, requests=asked, schedule=draw(schedules(len(asked))))


@st.composite
def siblings(draw: st.DrawFn, subject: Subject, model: Model, first: Asked) -> tuple[Spec, tuple[Spec, ...]]:
    """Draw a pipeline of the same plugins: of the first request's group, where only parameters of a request differ."""
    how = draw(st.sampled_from(["the same", "of its group", "of its group", "of another group"]))
    if how == "the same" or subject.name in subject.known.instances:
        return first.strategy, first.plugins
    drawn = draw(parameters(subject.kind, model.vocab_size, subject.params))
    if how == "of its group":
        own = per_request_fields(subject.kind.Params)
        kept = {name: value for name, value in _parameters(first, subject).items() if name not in own}
        drawn = {**kept, **{name: value for name, value in drawn.items() if name in own}}
    strategy, *plugins = (subject.spec(drawn) if _name(spec) == subject.name else spec for spec in _specs(first))
    try:
        subject.known.pipeline(strategy, tuple(plugins))
    except ConfigError:
        return first.strategy, first.plugins
    return strategy, tuple(plugins)


def _specs(asked: Asked) -> tuple[Spec, ...]:
    return asked.strategy, *asked.plugins


def _name(spec: Spec) -> str:
    return spec if isinstance(spec, str) else next(iter(spec))


def _parameters(asked: Asked, subject: Subject) -> dict[str, Any]:
    for spec in _specs(asked):
        if isinstance(spec, dict) and _name(spec) == subject.name:
            return dict(spec[subject.name])
    return {}


@check_of
def check_batch_invariance(case: Case, known: Known) -> None:
    """Check that each request gives what it gives alone, whatever else is in the batch and however little room is."""
    runner, models_ = case.model.runner(), case.model.companions()
    asked = case.prepared(known)
    expected = alone(runner, asked, models_)
    got = drive(runner, asked, circumstances(case, asked), models_, name="all together")
    for one, other in zip(expected, got, strict=True):
        lawful_end(one, f"request {one.id} alone")
        if parts := difference(one, other):
            raise Broken(f"request {one.id} alone and in the batch: {parts}")
    for request, result in zip(asked, expected, strict=True):
        _check_first_stream(case, request, result)


def _check_first_stream(case: Case, request: PreparedRequest, result: Result) -> None:
    """Check, where branches cannot affect each other, that the first gives what it gives when it is the only one."""
    own_start = type(request.pipeline.strategy).start is not Plugin.start
    if request.n == 1 or own_start or not request.pipeline.independent or result.error is not None:
        return
    [single] = alone(case.model.runner(), [replace(request, n=1)], case.model.companions())
    stream = tuple(hypothesis for hypothesis in result.hypotheses if hypothesis.stream == 0)
    first = replace(result, hypotheses=stream, reports=single.reports)  # a report is of all streams
    if single.error is None and (parts := difference(single, first)):
        raise Broken(f"request {request.id} with n = 1, and the first stream of {request.n}: {parts}")


BATCH_INVARIANCE = Law(
    "batch_invariance",
    "A request gives what it gives alone, whatever else is in the batch, whoever came first, and however often it lost "
    "its slots; an independent stream gives the same, however many there are.",
    "A server mixes strangers' requests. Where a neighbour changes a text, nothing can be reproduced, and one user "
    "sees traces of another. Usual causes: a reduction over all rows instead of one (`logits.max()`, a mean), a row "
    "number where a request or a stream was meant, parameters of a request read from `self.params`, state on `self`.",
    check_batch_invariance,
    _cases,
)
