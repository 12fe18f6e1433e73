"""One request's fault never touches another's, be it the plugin's, a neighbour's or the model's."""

from __future__ import annotations

from hypothesis import strategies as st

from unspool.errors import AdmissionError, DeadEnd, ModelError, PluginError, UnspoolError
from unspool.request import Result
from unspool.runner import ModelRunner
from unspool_testing.case import Asked, Case, circumstances
from unspool_testing.compare import difference
from unspool_testing.driver import alone, drive
from unspool_testing.generators import around, bears, models, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.runners import MisbehavingRunner
from unspool_testing.subject import Subject

NEVER = 99
"""New tokens that no text has."""


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    strategy, plugins = draw(around(subject, model.vocab_size))
    hook, after = draw(st.sampled_from(["logits_transform", "pre_forward", "stop_check"])), draw(st.integers(0, 2))
    fails, waits = ({"kit_fails": {"hook": hook, "after": length}} for length in (after, NEVER))
    neighbour = Asked(strategy="kit_greedy", plugins=(fails,), prompt=(1,), end_ids=())
    alike = Asked(strategy=strategy, plugins=plugins, prompt=(1,))
    if (
        subject.name != "kit_fails" and bears(subject.known, alike, fails) and draw(st.booleans())
    ):  # of one group: only a parameter of a request differs
        neighbour = neighbour.model_copy(update={"strategy": strategy, "plugins": (*plugins, fails)})
        plugins = (*plugins, waits)
    first, second = (draw(requests(subject, model, pipeline=(strategy, plugins))) for _ in range(2))
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
    of_one_group = any("kit_fails" in spec for spec in case.requests[0].plugins)
    # The neighbour that stands alone always raises; one of the group may come to an end of its own before.
    expected_errors = (PluginError, ModelError, *((DeadEnd, AdmissionError, type(None)) if of_one_group else ()))
    if not isinstance(got[2].error, expected_errors):
        raise Broken(f"the neighbour that raises ended with {got[2].error!r}")
    broke_down = sum(isinstance(result.error, ModelError) for result in got)
    most = sum(len(batch.spans) for number, batch in enumerate(runner.batches) if number % 4 == 2)
    if case.fault == "raise" and broke_down > most:  # a request has a span at least in a pass that it is in
        raise Broken(f"{broke_down} requests failed by passes with {most} spans that broke down")
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
