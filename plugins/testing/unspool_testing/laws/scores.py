"""Law 6: scores and log-probabilities are what they are said to be, results come in their order, and a search that
overlooks nothing finds what brute force finds.

What the pipeline's distributions were is seen by a spy on `select`; what the model's were, the table knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st

from unspool.errors import DeadEnd
from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Hypothesis, PreparedRequest
from unspool.step import Step
from unspool_testing.case import Asked, Case, circumstances
from unspool_testing.compare import TOLERANCE
from unspool_testing.driver import alone, drive
from unspool_testing.enumeration import claimed_texts
from unspool_testing.generators import a_drafter, models, neighbours, requests, schedules
from unspool_testing.known import Known, Spec
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.parameters import parameters
from unspool_testing.spy import Seen, choices_of, watch
from unspool_testing.subject import Subject
from unspool_testing.table import Path, TableModel

BRUTE_FORCE = "brute_force"
"""In a case's `replace`: the parameters are such that the search overlooks nothing."""


# ---- scores ----------------------------------------------------------------------------------------------------------


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    first = draw(requests(subject, model))
    others = draw(neighbours(subject, model, most=1))
    if draw(st.booleans()):  # of its own group, where it may be the only one to want log-probabilities
        others = (*others, draw(requests(subject, model, pipeline=(first.strategy, first.plugins))))
    return Case(
        subject=subject.name,
        model=model,
        requests=(first, *others),
        schedule=draw(schedules(1 + len(others))),
        drafter=draw(a_drafter(subject.known, first, model)),
    )


@dataclass
class _Scoring:
    """Who scores in a pipeline: nobody, the core, the strategy, or a plugin that changes scores."""

    own: bool = False
    changed_by: set[str] = field(default_factory=set)


def check_scores_add_up(case: Case, known: Known) -> None:
    """Check the scores and the log-probabilities of all texts."""
    model = case.model.runner()
    assert isinstance(model, TableModel)
    asked = case.drafting(known)
    rows: list[Seen] = []
    scorings = {}
    for pipeline in {id(request.pipeline): request.pipeline for request in asked}.values():
        growths: list[tuple[Step, Growth]] = []
        choices_of(pipeline, rows, growths)
        scorings[id(pipeline)] = _Scoring()
        _note_scoring(pipeline, scorings[id(pipeline)])
    results = drive(model, asked, circumstances(case, asked), case.model.companions(), name="the run")
    # A group is called through the pipeline of one of its requests.
    groups: dict[str, _Scoring] = {}
    for request in asked:
        scoring = groups.setdefault(request.pipeline.key, _Scoring())
        scoring.own |= scorings[id(request.pipeline)].own
        scoring.changed_by |= scorings[id(request.pipeline)].changed_by
    said = _said(rows)
    for request, result in zip(asked, results, strict=True):
        if not lawful_end(result, f"request {result.id}"):
            continue
        for hypothesis in result.hypotheses:
            _check_logprobs(request, hypothesis, model, said)
            _check_score(request, hypothesis, known, groups[request.pipeline.key], said)


def _note_scoring(pipeline: Pipeline, scoring: _Scoring) -> None:
    def select(call: Callable[[], Any], _step: Step, _logits: Any) -> Any:
        growth = call()
        scoring.own |= isinstance(growth, Growth) and growth.score is not None
        return growth

    watch(pipeline, "select", select)
    for plugin, _ in pipeline.implementations("stop_check"):

        def stop_check(call: Callable[[], Any], _: Step, growth: Growth, name: str = plugin.name) -> None:
            before = None if growth.score is None else growth.score.tolist()
            call()
            if (None if growth.score is None else growth.score.tolist()) != before:
                scoring.changed_by.add(name)

        watch(pipeline, "stop_check", stop_check, plugin.name)


Said = Mapping[tuple[str, Path], list[list[float]]]
"""Request and new tokens -> the log-probabilities of all tokens there. Where a transform draws noise, one a stream."""


def _said(rows: Sequence[Seen]) -> Said:
    said: dict[tuple[str, Path], list[list[float]]] = {}
    for seen in rows:
        there = said.setdefault((seen.request.id, seen.tokens), [])
        logprobs = seen.before.double().log_softmax(-1).tolist()
        if logprobs not in there:
            there.append(logprobs)
    return said


def _along(request: PreparedRequest, tokens: Path, said: Said) -> list[list[float]]:
    """List, for each token of a text, the log-probabilities that it may have had."""
    found = []
    for place, token in enumerate(tokens):
        rows = said.get((request.id, tokens[:place]))
        if rows is None:
            raise Broken(
                f"request {request.id}: {list(tokens)} came back, and no row stood after {list(tokens[:place])}"
            )
        found.append([logprobs[token] for logprobs in rows])
    return found


def _check_logprobs(request: PreparedRequest, hypothesis: Hypothesis, model: TableModel, said: Said) -> None:
    tokens, about = hypothesis.token_ids, f"request {request.id}, {list(hypothesis.token_ids)}"
    if request.logprobs is None:
        if hypothesis.logprobs is not None:
            raise Broken(f"{about}: log-probabilities came back, and nobody asked for them")
        return
    got = hypothesis.logprobs or ()
    if len(got) != len(tokens):
        raise Broken(f"{about}: {len(got)} log-probabilities for {len(tokens)} tokens")
    if request.logprobs == "pipeline":
        expected = _along(request, tokens, said)
    else:
        paths = [(*request.prompt_ids, *tokens[:place]) for place in range(len(tokens))]
        expected = [[float(model.logits_after(p).log_softmax(-1)[t])] for p, t in zip(paths, tokens, strict=True)]
    for place, (value, may_be) in enumerate(zip(got, expected, strict=True)):
        if not any(value == pytest.approx(other, abs=TOLERANCE) for other in may_be):
            whose = "what `select` saw" if request.logprobs == "pipeline" else "what the model says"
            raise Broken(
                f"{about}: token {place + 1} has the log-probability {value:.10g}, and {may_be[0]:.10g} by {whose}"
            )


def _check_score(request: PreparedRequest, hypothesis: Hypothesis, known: Known, scoring: _Scoring, said: Said) -> None:
    pipeline, score = request.pipeline, hypothesis.score
    about = f"request {request.id}, {list(hypothesis.token_ids)} {hypothesis.finish_reason}"
    strategy = pipeline.strategy.name
    claim = known.claim(strategy, "score")
    if not (scoring.own or scoring.changed_by or pipeline.scores or request.logprobs):
        if score is not None:
            raise Broken(f"{about}: it has score {score:.10g}, and nobody scores or asks for log-probabilities")
        return
    if score is None or math.isnan(score):
        raise Broken(f"{about}: it has score {score}, and it is scored")
    if scoring.changed_by - {strategy} or (claim is None and (scoring.own or scoring.changed_by)):
        return  # whoever scores claims nothing
    expected = [
        _claimed_score(request, hypothesis.token_ids, hypothesis.finish_reason, logprobs, claim)
        for logprobs in _ways(_along(request, hypothesis.token_ids, said))
    ]
    if None in expected:  # some parameters leave it open
        return
    if not any(score == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE) for other in expected):
        what = "its log-probabilities add up to" if claim is None else "the claim is"
        raise Broken(f"{about}: it has score {score:.10g}, and {what} {expected[0]:.10g}")


def _claimed_score(
    request: PreparedRequest, tokens: Path, reason: str, logprobs: Sequence[float], claim: Callable[..., float] | None
) -> float:
    if claim is None:
        return math.fsum(logprobs)
    try:
        return claim(request.pipeline.strategy.params, request, tokens, reason, logprobs)
    except Exception as error:
        raise Broken(f"{list(tokens)}: its claim `score` failed: {type(error).__name__}: {error}") from error


def _ways(along: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """List all ways to take one log-probability at each place: one way, as a rule."""
    ways: list[tuple[float, ...]] = [()]
    for values in along:
        ways = [(*way, value) for way in ways for value in dict.fromkeys(values)]
    return ways


SCORES_ADD_UP = Law(
    "scores_add_up",
    "A score is the sum of the pipeline's log-probabilities, or what the strategy claims it to be (one that scores and "
    "claims nothing is believed); log-probabilities "
    "are those of the model, or of the distribution that was chosen from, token by token.",
    "Scores rank texts, and log-probabilities are what evaluations are made of; wrong ones look like right ones. Usual "
    "causes: a transform that writes to `step.raw`, a `select` that writes to its logits, scores kept in a dictionary "
    "of its own and not along the branch, a length counted without the end token, a parent's score of another row.",
    check_of(check_scores_add_up),
    _cases,
    examples=80,
)


# ---- their order -----------------------------------------------------------------------------------------------------


@st.composite
def _ranked_cases(draw: st.DrawFn, subject: Subject) -> Case:
    exhaustive = subject.claim("exhaustive")
    if exhaustive is not None and draw(st.booleans()):
        return draw(_brute_force_cases(subject, exhaustive))
    model = draw(models())
    asked = draw(requests(subject, model))
    return Case(
        subject=subject.name, model=model, requests=(asked,), drafter=draw(a_drafter(subject.known, asked, model))
    )


@st.composite
def _brute_force_cases(draw: st.DrawFn, subject: Subject, exhaustive: Callable[..., dict[str, Any]]) -> Case:
    """Draw a search that overlooks nothing, among few enough texts."""
    vocab_size, new = draw(st.sampled_from([(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3)]))
    params = draw(parameters(subject.kind, vocab_size, subject.params))
    plugins: tuple[Spec, ...] = draw(
        st.sampled_from(
            [(), ("kit_tired",), ({"kit_bias": {"token": 1, "bias": 1.5}},), ({"kit_grammar": {"most": 9}},)]
        )
    )
    asked = Asked(
        strategy=subject.spec(params),
        plugins=plugins,
        prompt=(draw(st.integers(0, vocab_size - 1)),),
        max_new_tokens=new,
        min_new_tokens=draw(st.integers(0, 1)),
        n=draw(st.sampled_from([vocab_size**new, 1, 2])),
        logprobs="pipeline",
    )
    wide = {**params, **exhaustive(asked.prepared(subject.known), vocab_size)}
    asked = asked.model_copy(update={"strategy": {subject.name: wide}})
    model = draw(models(vocab_size, vocab_size))
    return Case(subject=subject.name, model=model, requests=(asked,), replace={BRUTE_FORCE: True})


def check_ranking(case: Case, known: Known) -> None:
    """Check in which order the texts come back, and whether a search that overlooks nothing finds them all."""
    model = case.model.runner()
    assert isinstance(model, TableModel)
    [request] = case.drafting(known)
    [result] = alone(model, [request], case.model.companions())
    exact = claimed_texts(known, request, model) if case.replace.get(BRUTE_FORCE) else None
    if not lawful_end(result):
        if exact and isinstance(result.error, DeadEnd):
            raise Broken(f"it met a dead end, and {list(next(iter(exact)))} is possible")
        return
    found = result.hypotheses
    if len(found) > request.n:
        raise Broken(f"{len(found)} texts came back, and n is {request.n}")
    if twice := _twice([(h.token_ids, h.stream) for h in found]):
        raise Broken(f"{list(twice[0])} of stream {twice[1]} came back twice")
    if request.pipeline.independent:
        if [h.stream for h in found] != sorted(h.stream for h in found):
            raise Broken(f"independent samples come in the order of their streams, not {[h.stream for h in found]}")
    elif type(request.pipeline.strategy).rank is Plugin.rank:
        scores = [math.inf if h.score is None else h.score for h in found]
        for place, (one, other) in enumerate(pairwise(scores)):
            if one < other:
                raise Broken(f"text number {place + 1} has score {one:.10g}, and the next one {other:.10g}")
    if exact is not None:
        _compare_with_brute_force(request, found, exact, known)


def _twice(found: Sequence[tuple[Path, int]]) -> tuple[Path, int] | None:
    return next((one for at, one in enumerate(found) if one in found[:at]), None)


def _compare_with_brute_force(
    request: PreparedRequest, found: Sequence[Hypothesis], exact: Mapping[Path, Sequence[float]], known: Known
) -> None:
    scores = {}
    for text, logprobs in exact.items():
        reason = "eos" if text[-1] in request.end_ids else "length"
        scores[text] = _claimed_score(
            request, text, reason, logprobs, known.claim(request.pipeline.strategy.name, "score")
        )
    ranked = sorted(scores, key=lambda text: -scores[text])
    if len(found) < min(request.n, len(ranked)):
        missing = next(text for text in ranked if text not in [h.token_ids for h in found])
        raise Broken(f"{len(found)} texts came back, and {len(ranked)} are possible, {list(missing)} among them")
    for place, hypothesis in enumerate(found):
        text, best = hypothesis.token_ids, ranked[place] if place < len(ranked) else None
        if text not in scores or best is None:
            raise Broken(f"{list(text)} came back, and it is not possible")
        if scores[text] != pytest.approx(scores[best], rel=TOLERANCE, abs=TOLERANCE):  # equals come in either order
            raise Broken(
                f"text number {place + 1} is {list(text)} of score {scores[text]:.10g}, and by brute force "
                f"{list(best)} of {scores[best]:.10g}"
            )


def _excuse(subject: Subject) -> str | None:
    return None if subject.is_strategy else "it is no strategy: it returns no texts"


RANKING = Law(
    "ranking",
    "At most `n` texts come back, none twice, the best score first (independent samples by stream); wide enough, a "
    "search that claims to be exhaustive finds every text that brute force finds.",
    "The first text is the one that users read. Usual causes: a score that is changed after the order was made, a "
    "finished text that is forgotten or kept twice, a candidate that is cut before it is known which ones ended.",
    check_of(check_ranking),
    _ranked_cases,
    _excuse,
    examples=80,
)
