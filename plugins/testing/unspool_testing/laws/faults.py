"""One request's fault never touches another's, be it the plugin's, a neighbour's or the model's."""

from __future__ import annotations

from hypothesis import strategies as st

from unspool.errors import ModelError, PluginError, UnspoolError
from unspool.request import Result
from unspool.runner import ModelRunner
from unspool_testing.case import Asked, Case, circumstances
from unspool_testing.compare import difference
from unspool_testing.driver import alone, drive
from unspool_testing.generators import models, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.runners import MisbehavingRunner
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    first = draw(requests(subject, model))
    second = draw(requests(subject, model, pipeline=(first.strategy, first.plugins)))
    hook = draw(st.sampled_from(["logits_transform", "pre_forward", "stop_check"]))
    fails = {"kit_fails": {"hook": hook, "after": draw(st.integers(0, 2))}}
    neighbour = Asked(strategy="kit_greedy", plugins=(fails,), prompt=(1,), end_ids=())
    return Case(
        subject=subject.name,
        model=model,
        requests=(first, second, neighbour),
        schedule=draw(schedules(3)),
        fault=draw(st.sampled_from([None, "nan", "raise"])),
    )


@check_of
def check_fault_isolation(case: Case, known: Known) -> None:
    """Run requests beside one that fails, on a model that may give NaN or raise; compare them with undisturbed ones."""
    models_ = case.model.companions()
    asked = case.prepared(known)
    room = circumstances(case, asked)
    expected = [alone(_spoilt(case), [one], models_)[0] for one in asked[:2]]
    for result in expected:
        if case.fault != "nan":
            lawful_end(result)
        elif result.error is not None and not _typed(result):
            raise Broken(f"request {result.id}, on a model that gives NaN, failed with {result.error!r}")
    runner = MisbehavingRunner(_spoilt(case), raises=lambda number: case.fault == "raise" and number % 4 == 2)
    got = drive(runner, asked, room, models_, name="beside a failing request")
    if not isinstance(got[2].error, PluginError | ModelError):
        raise Broken(f"the neighbour that raises ended with {got[2].error!r}")
    for one, other in zip(expected, got[:2], strict=True):
        if case.fault == "raise" and isinstance(other.error, ModelError):
            continue  # it was in a pass that broke down
        if parts := difference(one, other):
            raise Broken(f"request {one.id} alone and beside a failing one: {parts}")


def _spoilt(case: Case) -> ModelRunner:
    """Make the model; where the case says so, it gives NaN after the last token of the vocabulary."""
    if case.fault != "nan":
        return case.model.runner()
    return MisbehavingRunner(case.model.runner(), nan_after={case.model.vocab_size - 1})


def _typed(result: Result) -> bool:
    return isinstance(result.error, UnspoolError)


FAULT_ISOLATION = Law(
    "fault_isolation",
    "A request gives the same beside one that fails, and on a model that breaks down it fails with a typed error or "
    "not at all.",
    "In a shared batch one bad request must not spoil the others. Usual causes: a hook that changes a request's own "
    "object before something in it may raise; NaN that spreads from one row to others by a sum; an exception that is "
    "swallowed.",
    check_fault_isolation,
    _cases,
    examples=40,
)
