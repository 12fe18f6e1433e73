"""Law 9: when a request ends, fails or is cancelled, all that it had is free; until then it has what it needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st

from unspool.plugin import Plugin
from unspool.request import PreparedRequest, Result
from unspool_testing.case import Case, circumstances
from unspool_testing.compare import with_pipeline, with_plugin
from unspool_testing.driver import drive
from unspool_testing.generators import bears, beginning_alike, models, neighbours, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of
from unspool_testing.runners import MisbehavingRunner
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = [draw(requests(subject, model)) for _ in range(draw(st.integers(1, 2)))]
    everybody = draw(beginning_alike(subject, (*asked, *draw(neighbours(subject, model, most=1)))))
    bear = not subject.drafts and all(bears(subject.known, one, "kit_chains") for one in everybody)
    return Case(
        subject=subject.name,
        model=model,
        requests=everybody,
        schedule=draw(schedules(len(everybody), cancels=True, quiet=False)),
        drafter=draw(st.sampled_from([None, "kit_chains", "kit_trees"])) if bear else None,
        fault=draw(st.sampled_from([None, None, None, "nan", "dead", "raise"])),
    )


class _Books:
    """Counts what a plugin opens and closes."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin, self._open, self._close = plugin, plugin.open, plugin.close
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.given: list[Any] = []

    def __enter__(self) -> _Books:
        self._plugin.open, self._plugin.close = self.open, self.close  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        del self._plugin.open, self._plugin.close

    def open(self, request: PreparedRequest) -> Any:
        self.opened[request.id] += 1
        return self._open(request)

    def close(self, own: Any, result: Result) -> None:
        self.closed[result.id] += 1
        self._close(own, result)


@check_of
def check_conservation(case: Case, known: Known) -> None:
    """Check after every step that slots, nodes and states are those that are needed, and at the end that none is."""
    runner = case.model.runner()
    asked = case.prepared(known)
    if case.drafter is not None:
        guess = known.plugin({str(case.drafter): {"vocab_size": case.model.vocab_size}})
        asked = [with_pipeline(one, with_plugin(one.pipeline, guess)) for one in asked]
    room = circumstances(case, asked)
    if case.fault is not None:
        last = {case.model.vocab_size - 1}
        runner = MisbehavingRunner(
            runner,
            nan_after=last if case.fault == "nan" else (),
            dead_after=last if case.fault == "dead" else (),
            raises=lambda number: case.fault == "raise" and number % 3 == 1,
        )
    owners = [p for p in asked[0].pipeline.plugins if p.name == case.subject and type(p).open is not Plugin.open]
    try:
        if owners:
            with _Books(owners[0]) as books:
                drive(runner, asked, room, case.model.companions(), name="the run")
            if books.opened != books.closed:
                raise Broken(f"opened for {dict(books.opened)}, and closed for {dict(books.closed)}")
        else:
            drive(runner, asked, room, case.model.companions(), name="the run")
    except Broken:
        raise
    except AssertionError as error:
        raise Broken(str(error)) from error


CONSERVATION = Law(
    "conservation",
    "Between two steps every cache slot, node and state belongs to somebody who needs it, or to a prompt that is kept "
    "until somebody does, and when all requests have ended, failed or been cancelled, everything is free.",
    "A slot that leaks is lost until the server restarts; one that is freed twice is given to two requests, and both "
    "texts are wrong. It is the core that keeps the books. A plugin breaks them by calling what it must not, and its "
    "own by an `open` without a `close`.",
    check_conservation,
    _cases,
)
