"""Law 3: no drafter changes a text, and rounds held at once give what rounds held one by one give."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Result
from unspool_testing.case import Case, Schedule, circumstances
from unspool_testing.compare import difference, with_pipeline, with_plugin
from unspool_testing.drafters import Recall
from unspool_testing.driver import alone, drive
from unspool_testing.generators import drafters, models, neighbours, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model, most_new=8))
    if subject.drafts:
        drafter = None  # it is the drafter: the law compares its pipeline with the same one without it
    else:
        guesses = drafters(subject.known, asked, model)
        drafter = draw(st.one_of(guesses, guesses, st.just("kit_recall")))
        try:
            _drafting(subject.known.pipeline(asked.strategy, asked.plugins), subject.known, drafter)
        except ConfigError:
            assume(False)
    disturbed = draw(st.booleans())
    others = draw(neighbours(subject, model, most=1)) if disturbed else ()
    return Case(
        subject=subject.name,
        model=model,
        requests=(asked, *others),
        schedule=draw(schedules(1 + len(others))) if disturbed else Schedule(),
        drafter=drafter,
    )


@check_of
def check_speculation_is_invisible(case: Case, known: Known) -> None:
    """Check that a pipeline with a drafter gives what it gives without, round by round and looking ahead."""
    runner, models_ = case.model.runner(), case.model.companions()
    first, *others = case.prepared(known)
    plain, drafting = _both(case, known, first.pipeline)
    without = with_pipeline(first, plain)
    expected = alone(runner, [without], models_)[0]
    lawful_end(expected, "without drafts, the request")
    asked = with_pipeline(first, drafting, **_told(drafting, expected))
    able = drafting.looks_ahead
    try:
        for drafting.looks_ahead in sorted({able, False}, reverse=True):
            how = "looking ahead" if drafting.looks_ahead else "round by round"
            everybody = [asked, *others]
            got = drive(runner, everybody, circumstances(case, everybody), models_, name=f"with drafts, {how}")[0]
            if parts := difference(expected, got):
                raise Broken(f"without drafts and with them, {how}: {parts}")
            passes, before = got.stats.forward_passes, expected.stats.forward_passes
            if case.schedule == Schedule() and not others and passes > before:
                raise Broken(f"with drafts, {how}, {passes} passes, and {before} without")
            if passes > 1 and _told_all(case, plain, expected):
                raise Broken(f"with drafts that are all right, {how}, {passes} passes, and one is enough")
    finally:
        drafting.looks_ahead = able


def _both(case: Case, known: Known, pipeline: Pipeline) -> tuple[Pipeline, Pipeline]:
    """Give a pipeline without its drafter, and with it."""
    if case.drafter is not None:
        return pipeline, _drafting(pipeline, known, case.drafter)
    rest = [plugin for plugin in pipeline.plugins[:-1] if plugin.name != case.subject]
    return Pipeline(pipeline.strategy, rest), pipeline


def _drafting(pipeline: Pipeline, known: Known, drafter: object) -> Pipeline:
    return with_plugin(pipeline, known.plugin(drafter))  # type: ignore[arg-type]


def _told(drafting: Pipeline, expected: Result) -> dict[str, Recall.Params]:
    """Tell a drafter that is always right what is going to come, and what comes after each end."""
    names = [plugin.name for plugin in drafting.plugins if isinstance(plugin, Recall)]
    texts = tuple((*h.token_ids, 1, 1) for h in expected.hypotheses)
    return {name: Recall.Params(texts=texts) for name in names}


def _told_all(case: Case, plain: Pipeline, expected: Result) -> bool:
    """Tell whether one pass can run all that comes: the drafter knows it, and there is room for it."""
    starts = type(plain.strategy).start is Plugin.start and not plain.strategy.holds
    alone = case.schedule == Schedule() and len(case.requests) == 1
    whole = expected.error is None and len(expected.hypotheses) == case.first().n  # no branch died on its way
    return case.drafter == "kit_recall" and alone and plain.independent and starts and whole


SPECULATION_IS_INVISIBLE = Law(
    "speculation_is_invisible",
    "Drafts change no token, no score, no order and no finish reason, and never cost a pass.",
    "Speculation is for speed alone. Where it shows, turning it on changes what users get, and nobody can tell which "
    "of the two is right. Usual causes: a child chosen because a draft is there; `row_local` declared by a plugin that "
    "looks at other rows or at `step.round`; a path state that is not a function of the path; a hook that looks at the "
    "last token of the request instead of the row's path.",
    check_speculation_is_invisible,
    _cases,
    examples=80,
)
