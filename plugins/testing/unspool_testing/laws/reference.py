"""A plugin does what it claims: each row that it edits, each text that it ends, each text that it returns.

Rows are compared in real runs, with others beside it, drafts, several requests and noise streams. A claim is computed
in another order than the plugin's tensors, so its last digits differ. Where a token lies exactly at a threshold they
decide, and no side is wrong: a difference counts only if no claim about a row nudged by less than anybody notices
agrees with the plugin. Equal logits are nudged together, so that ties between tokens stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from unspool.errors import ConfigError, Problem
from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest, Result
from unspool.step import Step
from unspool_testing.case import Case, circumstances
from unspool_testing.claims import Row, floats
from unspool_testing.compare import TOLERANCE
from unspool_testing.driver import drive
from unspool_testing.generators import a_drafter, models, requests, schedules, tied
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.spy import Seen, reached, transforms_of, watch
from unspool_testing.subject import Subject
from unspool_testing.table import Path, TableModel

COMPARED = ("transform", "texts", "finishes")
"""The claims of this law."""

NUDGE, PARAMETER_NUDGE = 1e-10, 1e-12
"""How far logits and parameters are moved, by their size, to see whether a token lies at a threshold. Rounding is far
below both; a probability near 1 follows no logit, so parameters move too."""


# ---- cases -----------------------------------------------------------------------------------------------------------


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(st.one_of(tied(), models()))
    if subject.claim("texts") is not None and not subject.kind.row_local:
        # Equal terms in another order add up to nearly equal sums, and rounding decides: no two paths shall agree.
        model = draw(models()).model_copy(update={"memory": None})
    alone = subject.claim("texts") is not None and draw(st.booleans())
    first = draw(requests(subject, model, most_new=8, most_beside=0 if alone else 2))
    others = [
        draw(requests(subject, model, pipeline=draw(st.sampled_from([None, (first.strategy, first.plugins)]))))
        for _ in range(draw(st.integers(0, 2)))
    ]
    return Case(
        subject=subject.name,
        model=model,
        requests=(first, *others),
        schedule=draw(schedules(1 + len(others))),
        drafter=draw(a_drafter(subject.known, first, model)),
    )


# ---- the law ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ended:
    """What a plugin's `stop_check` said of one child."""

    request: PreparedRequest
    tokens: Path
    ahead: bool
    reason: str | None


def check_reference(case: Case, known: Known) -> None:
    """Check rows, ends and texts against what the plugin claims of them."""
    model = case.model.runner()
    assert isinstance(model, TableModel)
    asked = [replace(request, logprobs="pipeline") for request in case.drafting(known)]  # for claims that read them
    rows: list[Seen] = []
    ends: list[_Ended] = []
    for pipeline in {id(request.pipeline): request.pipeline for request in asked}.values():
        transforms_of(pipeline, case.subject, rows)
        _ends_of(pipeline, case.subject, ends)
    results = drive(model, asked, circumstances(case, asked), case.model.companions(), name="the run")
    for result in results:
        lawful_end(result, f"request {result.id}")
    if transform := known.claim(case.subject, "transform"):
        for seen in reached(rows, results):
            if max(floats(seen.before)) > -math.inf:  # nothing follows a row of which everything is forbidden
                _compare_row(case.subject, transform, seen, model)
    if finishes := known.claim(case.subject, "finishes"):
        _compare_ends(case.subject, finishes, ends, results)
    if texts := known.claim(case.subject, "texts"):
        for given, request, result in zip(case.requests, asked, results, strict=True):
            if len(request.pipeline.plugins) == 1 and not given.plugins:
                claimed = texts(request.pipeline.strategy.params, model, request)
                if claimed is not None:  # some parameters leave it open
                    _compare_texts(claimed, request, result)


def _compare_row(name: str, transform: Callable[..., Sequence[float]], seen: Seen, model: TableModel) -> None:
    params, row, got = seen.request.parameters[name], seen.row(model), floats(seen.after)
    try:
        claimed = transform(params, row)
    except Exception as error:
        raise Broken(f"{seen}: its claim `transform` failed: {type(error).__name__}: {error}") from error
    if len(claimed) != len(got):
        raise Broken(f"{seen}: its claim `transform` gives {len(claimed)} numbers for {len(got)} tokens")
    for token in range(len(got)):
        if not _same(claimed[token], got[token]) and not any(
            _same(transform(*other)[token], got[token]) for other in _nudged(params, row)
        ):
            raise Broken(
                f"{seen}: {name} makes {_number(got[token])} of the logit {_number(row.logits[token])} of token "
                f"{token}, and claims to make {_number(claimed[token])} of it"
            )


def _same(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _nudged(params: BaseModel, row: Row) -> Iterator[tuple[BaseModel, Row]]:
    """Move logits of one size, or one parameter, by less than anybody notices."""
    for value in dict.fromkeys(logit for logit in row.logits if math.isfinite(logit)):
        for moved in _beside(value, NUDGE):
            yield params, replace(row, logits=[moved if logit == value else logit for logit in row.logits])
    for field, value in params:
        if isinstance(value, float):
            try:
                both = [
                    type(params).model_validate({**dict(params), field: moved})
                    for moved in _beside(value, PARAMETER_NUDGE)
                ]
            except ValidationError:
                continue  # it lies on its bound, where what it means is exact (a mass of 1 is everything)
            yield from ((moved_params, row) for moved_params in both)


def _beside(value: float, nudge: float) -> tuple[float, float]:
    return value - nudge * max(1.0, abs(value)), value + nudge * max(1.0, abs(value))


def _number(value: float) -> str:
    return f"{value:.10g}"


def _ends_of(pipeline: Pipeline, plugin: str, ends: list[_Ended]) -> None:
    """Note what a plugin's `stop_check` says of children that nobody before it has ended."""

    def around(call: Callable[[], Any], step: Step, growth: Growth) -> None:
        before = list(growth.finish)
        call()
        ids, lengths = growth.paths()
        for child, row in enumerate(growth.row.tolist()):
            if before[child] is None:
                request = step.requests[int(growth.request[child])]
                tokens = tuple(ids[child, len(request.prompt_ids) : int(lengths[child])].tolist())
                ahead = step._rows.branch[row].node != step._rows.node[row]
                ends.append(_Ended(request, tokens, ahead, growth.finish[child]))

    watch(pipeline, "stop_check", around, plugin)


def _compare_ends(
    name: str, finishes: Callable[..., str | None], ends: Sequence[_Ended], results: Sequence[Result]
) -> None:
    returned = {
        (r.id, h.token_ids[:length]) for r in results for h in r.hypotheses for length in range(len(h.token_ids))
    }
    for end in ends:
        if end.ahead and (end.request.id, end.tokens[:-1]) not in returned:
            continue  # behind an end, maybe: see `reached`
        about = f"request {end.request.id}, the new tokens {list(end.tokens)}"
        try:
            claimed = finishes(end.request.parameters[name], end.request, end.tokens)
        except NotImplementedError:
            continue  # it is left open
        except Exception as error:
            raise Broken(f"{about}: its claim `finishes` failed: {type(error).__name__}: {error}") from error
        if claimed != end.reason:
            raise Broken(f"{about}: {name} {_said(end.reason)}, and claims that it {_said(claimed)}")


def _said(reason: str | None) -> str:
    return "lets the text go on" if reason is None else f"ends the text with {reason!r}"


def _compare_texts(claimed: Sequence[tuple[Path, float | None]], request: PreparedRequest, result: Result) -> None:
    got = [(h.token_ids, h.score) for h in result.hypotheses]
    about = f"request {request.id}"
    if len(got) != len(claimed):
        raise Broken(f"{about}: it returns {len(got)} texts, and claims to return {len(claimed)}")
    for place, ((tokens, score), (text, claimed_score)) in enumerate(zip(got, claimed, strict=True)):
        if claimed_score is not None and score != pytest.approx(claimed_score, rel=TOLERANCE, abs=TOLERANCE):
            raise Broken(f"{about}: {list(tokens)} has score {score}, and the claim is {claimed_score}")
        # Texts of one score may come in either order.
        equals = [
            t
            for t, s in claimed
            if claimed_score is not None and s == pytest.approx(claimed_score, rel=TOLERANCE, abs=TOLERANCE)
        ]
        if tokens != tuple(text) and tokens not in map(tuple, equals):
            raise Broken(f"{about}: text number {place + 1} is {list(tokens)}, and the claim is {list(text)}")


def _excuse(subject: Subject) -> str | None:
    claimed = [method for method in COMPARED if subject.claim(method) is not None]
    if not claimed:
        return f"it claims none of {', '.join(COMPARED)}: see `unspool_testing.claims`"
    for method, hook in (("transform", "logits_transform"), ("finishes", "stop_check"), ("texts", "select")):
        if method in claimed and not subject.has(hook):
            raise ConfigError([Problem(f"claims of {subject.name}.{method}", f"it does not implement {hook}")])
    return None


REFERENCE = Law(
    "reference",
    "It does what it claims: it edits each row, ends each text and returns those texts as its claim says, computed "
    "a second time, without tensors.",
    "A sampler that cuts one token too many is as fluent as a right one, so nobody sees it; results that are compared "
    "with a paper's are then another method's. Usual causes: a sort that is not stable, a cumulative sum that is off "
    "by one, rows mixed up where requests have parameters of their own, padding or the prompt counted, a token that "
    "is forbidden already.",
    check_of(check_reference),
    _cases,
    _excuse,
    examples=100,
)
