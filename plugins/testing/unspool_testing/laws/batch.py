"""Law 1: a request's output does not depend on what else is in the batch, on arrival, on slots, or on preemption."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from unspool_testing.case import Case, circumstances
from unspool_testing.compare import difference
from unspool_testing.driver import alone, drive
from unspool_testing.generators import models, neighbours, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject


@st.composite
def _drawn(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    first = draw(requests(subject, model))
    others = []
    for _ in range(draw(st.integers(0, 2))):  # of its own group, where only parameters of a request differ
        pipeline = draw(st.sampled_from([None, (first.strategy, first.plugins)]))
        others.append(draw(requests(subject, model, pipeline=pipeline)))
    asked = (first, *others, *draw(neighbours(subject, model)))
    return Case(subject=subject.name, model=model, requests=asked, schedule=draw(schedules(len(asked))))


def _cases(subject: Subject) -> SearchStrategy[Case]:
    return _drawn(subject)


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


BATCH_INVARIANCE = Law(
    "batch_invariance",
    "A request gives what it gives alone, whatever else is in the batch, whoever came first, and however often it lost "
    "its slots.",
    "A server mixes strangers' requests. Where a neighbour changes a text, nothing can be reproduced, and one user "
    "sees traces of another. Usual causes: a reduction over all rows instead of one (`logits.max()`, a mean), a row "
    "number where a request or a stream was meant, parameters of a request read from `self.params`, state on `self`.",
    check_batch_invariance,
    _cases,
)
