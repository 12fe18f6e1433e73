"""What was streamed stays: a token that was called final is in the result, at its place."""

from __future__ import annotations

from hypothesis import strategies as st

from unspool.handle import newly_final
from unspool.loop import Loop
from unspool.request import PreparedRequest, Result
from unspool_testing.case import Case, circumstances
from unspool_testing.driver import drive
from unspool_testing.generators import a_drafter, models, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model, most_new=8))
    return Case(
        subject=subject.name,
        model=model,
        requests=(asked,),
        schedule=draw(schedules(1, cancels=True)),
        drafter=draw(a_drafter(subject.known, asked, model)),
    )


@check_of
def check_streaming_is_final(case: Case, known: Known) -> None:
    """Collect after each step what has become final, and compare it with what is returned in the end."""
    [request] = case.drafting(known)
    final: list[list[int]] = [[] for _ in range(request.n if request.pipeline.independent else 1)]

    def listen(loop: Loop) -> None:
        for live in loop.scheduler.running:
            for index, tokens in enumerate(newly_final(loop.tree, live, final)):
                final[index] += tokens

    room = circumstances(case, [request])
    [result] = drive(case.model.runner(), [request], room, case.model.companions(), listen, name="the run")
    if lawful_end(result):
        _check_begin(request, result, final)


def _check_begin(request: PreparedRequest, result: Result, final: list[list[int]]) -> None:
    for hypothesis in result.hypotheses:
        stream = hypothesis.stream if request.pipeline.independent else 0
        if stream < len(final) and list(hypothesis.token_ids[: len(final[stream])]) != final[stream]:
            raise Broken(f"{final[stream]} was streamed, and the result says {list(hypothesis.token_ids)}")


STREAMING_IS_FINAL = Law(
    "streaming_is_final",
    "What was streamed is how every returned text of that stream begins: nothing is taken back.",
    "A reader has seen it. Usual causes: a strategy that is declared `row_local` while its branches affect each other; "
    "a `rank` that brings a text forward which was thought lost; a hypothesis that grows again.",
    check_streaming_is_final,
    _cases,
    examples=40,
)
