"""Law 5: nothing follows an end, and limits are exact."""

from __future__ import annotations

from hypothesis import strategies as st

from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest, Result
from unspool_testing.case import Case, circumstances
from unspool_testing.compare import with_pipeline, with_plugin
from unspool_testing.drafters import Recall
from unspool_testing.driver import alone, drive
from unspool_testing.generators import bears, models, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject

CORE_REASONS = ("eos", "length", "stop_string", "deadline")


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model, most_new=8))
    return Case(
        subject=subject.name,
        model=model,
        requests=(asked,),
        schedule=draw(schedules(1, cancels=True)),
        drafter=draw(st.sampled_from([None, "kit_recall"])) if bears(subject.known, asked, "kit_recall") else None,
    )


@check_of
def check_stop_is_exact(case: Case, known: Known) -> None:
    """Check each text's end, with drafts that are right and go on beyond it, and when it is cancelled."""
    runner, models_ = case.model.runner(), case.model.companions()
    [request] = case.prepared(known)
    if case.drafter is not None:
        request = _with_beyond(request, known, alone(runner, [request], models_)[0])
    [result] = drive(runner, [request], circumstances(case, [request]), models_, name="the run")
    if not lawful_end(result):
        return
    if not 1 <= len(result.hypotheses) <= request.n:
        raise Broken(f"{len(result.hypotheses)} hypotheses were returned, and n is {request.n}")
    for hypothesis in result.hypotheses:
        if wrong := _wrong(request, hypothesis.token_ids, hypothesis.finish_reason, bool(case.schedule.cancels)):
            raise Broken(f"{list(hypothesis.token_ids)} {hypothesis.finish_reason}: {wrong}")


def _wrong(request: PreparedRequest, tokens: tuple[int, ...], reason: str, may_cancel: bool) -> str | None:
    ends, limits = set(request.end_ids), request.limits
    if any(token in ends for token in tokens[:-1]):
        return f"something follows an end token ({sorted(ends)})"
    if any(token in ends for token in tokens[: limits.min_new_tokens]):
        return f"an end token stands below min_new_tokens ({limits.min_new_tokens})"
    if len(tokens) > limits.max_new_tokens:
        return f"it is longer than max_new_tokens ({limits.max_new_tokens})"
    if reason == "cancelled":
        return None if may_cancel else "nobody cancelled it"
    if not tokens:
        return "it is empty, and was not cancelled"
    if tokens[-1] in ends:
        return None if reason == "eos" else "it ends with an end token, so its finish reason is eos"
    if len(tokens) == limits.max_new_tokens:
        return None if reason == "length" else "it has max_new_tokens tokens, so its finish reason is length"
    if reason in CORE_REASONS:
        return "neither an end token nor a limit was reached"
    return None


def _with_beyond(request: PreparedRequest, known: Known, result: Result) -> PreparedRequest:
    """Give the request a drafter that knows its texts and would go on behind their ends."""
    pipeline: Pipeline = with_plugin(request.pipeline, known.plugin("kit_recall"))
    texts = tuple((*h.token_ids, 1, 1, 1) for h in result.hypotheses)
    return with_pipeline(request, pipeline, kit_recall=Recall.Params(texts=texts, length=12))


STOP_IS_EXACT = Law(
    "stop_is_exact",
    "Nothing follows an end token, no end token stands below `min_new_tokens`, no text is longer than "
    "`max_new_tokens`, finish reasons are right, and between one and `n` texts come back.",
    "Outputs that run on, or stop short, are what users of a decoder complain about most. Usual causes: a strategy "
    "that counts its own length and is off by one; a draft that is taken beyond an end; a `stop_check` that forgets "
    "finished texts, or finishes what has not ended.",
    check_stop_is_exact,
    _cases,
)
