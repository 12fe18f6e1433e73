"""Law 8: a constraint only forbids, before everybody else, what its language forbids and nothing else.

Whether a text is in the language only the claim `allows` can say. Without one the law still checks that the mask and
the path state agree, that the constraint acts first, and that a dead end is called one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from unspool.errors import ConfigError, DeadEnd
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import PreparedRequest, Result
from unspool.runner import ModelRunner
from unspool.step import Step
from unspool_testing.case import Case, circumstances
from unspool_testing.claims import floats
from unspool_testing.driver import Models, alone, drive
from unspool_testing.generators import a_drafter, models, requests, schedules, tied
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.spy import Seen, reached, transforms_of, watch
from unspool_testing.subject import Subject
from unspool_testing.table import Path

WHOLE = ("eos", "grammar_end")
"""Finish reasons of texts that are complete."""


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(st.one_of(models(most=4), tied(most=4)))
    asked = draw(requests(subject, model, most_new=8))
    return Case(
        subject=subject.name,
        model=model,
        requests=(asked,),
        schedule=draw(schedules(1)),
        drafter=draw(a_drafter(subject.known, asked, model)),
    )


def check_constraint(case: Case, known: Known) -> None:
    """Check what a constraint forbids in a run, the texts that come of it, and that its place is no matter."""
    model, others = case.model.runner(), case.model.companions()
    [request] = case.drafting(known)
    rows: list[Seen] = []
    dead: set[Path] = set()
    transforms_of(request.pipeline, case.subject, rows)
    _dead_ends(request.pipeline, dead)
    [result] = drive(model, [request], circumstances(case, [request]), others, name="the run")
    plugin = next(p for p in request.pipeline.plugins if p.name == case.subject)
    really = reached(rows, [result])
    folds = type(plugin).initial is not Plugin.initial and not plugin.reads_logprob
    for seen in really:
        _only_forbids(case.subject, seen)
        if folds:
            _advances(plugin, seen)
    lawful_end(result)
    if isinstance(result.error, DeadEnd):
        if result.error.path not in dead:
            raise Broken(f"it met a dead end after {list(result.error.path)}, where not everything was forbidden")
    else:
        _obeys(case.subject, really, result)
    if (allows := known.claim(case.subject, "allows")) is not None:
        _speaks(case.subject, allows, request, result)
        for seen in really:
            _forbids_the_rest(case.subject, allows, seen)
    order = [p for p, _ in request.pipeline.implementations("logits_transform")]
    if late := [p.name for p in order[: order.index(plugin)] if not p.constraint]:
        raise Broken(f"{case.subject} is a constraint, and {late[0]} acts before it")
    _is_no_matter_where(case, known, model, others)


def _only_forbids(name: str, seen: Seen) -> None:
    for token, (before, after) in enumerate(zip(floats(seen.before), floats(seen.after), strict=True)):
        if after not in (before, -math.inf):
            raise Broken(
                f"{seen}: {name} is a constraint, and makes {after:.10g} of the logit {before:.10g} of token {token}: "
                "it may leave it or forbid it"
            )


def _open(seen: Seen) -> Iterator[tuple[int, bool]]:
    """List the tokens that were still possible, and whether the constraint left them so."""
    for token, (before, after) in enumerate(zip(floats(seen.before), floats(seen.after), strict=True)):
        if before > -math.inf:
            yield token, after > -math.inf


def _advances(plugin: Plugin, seen: Seen) -> None:
    for token, left in _open(seen):
        if not left or token in seen.request.end_ids:
            continue
        try:
            state = plugin.advance(seen.state, token)
        except Exception as error:
            raise Broken(
                f"{seen}: {plugin.name} allows token {token}, and its `advance` fails there: "
                f"{type(error).__name__}: {error}"
            ) from error
        if state is None:
            raise Broken(f"{seen}: {plugin.name} allows token {token}, and its `advance` calls it impossible")


def _dead_ends(pipeline: Pipeline, dead: set[Path]) -> None:
    """Note after which new tokens everything is forbidden, once all transforms have acted."""
    last = pipeline.implementations("logits_transform")[-1][0].name

    def around(call: Callable[[], Any], step: Step, logits: Tensor) -> None:
        call()
        ids, lengths = step.paths()
        for row in (logits.amax(-1) == -math.inf).nonzero().squeeze(1).tolist():
            length = int(lengths[row])
            dead.add(tuple(ids[row, length - int(step.length[row]) : length].tolist()))

    watch(pipeline, "logits_transform", around, last)


def _obeys(name: str, rows: Sequence[Seen], result: Result) -> None:
    """Check that no text goes where the constraint forbade to go."""
    left: dict[Path, set[int]] = {}
    for seen in rows:
        left.setdefault(seen.tokens, set()).update(token for token, allowed in _open(seen) if allowed)
    for hypothesis in result.hypotheses:
        for place, token in enumerate(hypothesis.token_ids):
            if token not in left.get(hypothesis.token_ids[:place], ()):
                raise Broken(f"{list(hypothesis.token_ids)} came back, and {name} never allowed its token {place + 1}")


def _speaks(name: str, allows: Callable[..., bool], request: PreparedRequest, result: Result) -> None:
    # Where another plugin ends texts, it says nothing of this one's language.
    enders = [p for p, _ in request.pipeline.implementations("stop_check") if p.name != name]
    for hypothesis in result.hypotheses:
        reason = hypothesis.finish_reason
        ended = reason == "eos" or (reason in WHOLE and not enders)
        if _allowed(name, allows, request, hypothesis.token_ids, ended) is False:
            how = "as a whole" if ended else "as a beginning"
            raise Broken(f"{list(hypothesis.token_ids)} {reason} came back, and {name} claims not to allow it {how}")


def _forbids_the_rest(name: str, allows: Callable[..., bool], seen: Seen) -> None:
    for token, left in _open(seen):
        ended = token in seen.request.end_ids
        if _allowed(name, allows, seen.request, (*seen.tokens, token), ended) not in (left, None):
            does, claims = ("allows", "forbid") if left else ("forbids", "allow")
            raise Broken(f"{seen}: {name} {does} token {token}, and claims to {claims} it")


def _allowed(
    name: str, allows: Callable[..., bool], request: PreparedRequest, tokens: Path, ended: bool
) -> bool | None:
    try:
        return bool(allows(request.parameters[name], request, tokens, ended))
    except NotImplementedError:
        return None  # it is left open
    except Exception as error:
        raise Broken(f"{list(tokens)}: its claim `allows` failed: {type(error).__name__}: {error}") from error


def _is_no_matter_where(case: Case, known: Known, model: ModelRunner, others: Models) -> None:
    """Check that it is no matter where among the other plugins a config puts it; constraints keep their order."""
    asked = case.first()
    built = [known.plugin(spec) for spec in asked.plugins]
    own = [plugin.name == case.subject for plugin in built].index(True)
    runs = []
    for place in range(len(built)):
        order = [spec for at, spec in enumerate(asked.plugins) if at != own]
        order.insert(place, asked.plugins[own])
        between = built[min(place, own) : max(place, own) + 1]
        if sum(plugin.constraint for plugin in between) > 1:
            continue
        try:
            moved = asked.model_copy(update={"plugins": tuple(order)}).prepared(known)
        except ConfigError:
            continue
        [result] = alone(model, [replace(moved, logprobs="pipeline")], others)
        runs.append((place, result))
    for place, result in runs[1:]:
        if _texts(result) != _texts(runs[0][1]):
            first, second = (f"as plugin number {at + 1}" for at in (runs[0][0], place))
            raise Broken(f"{first} it gives {_texts(runs[0][1])}, {second} {_texts(result)}")


def _texts(result: Result) -> object:
    if result.error is not None:
        return f"{type(result.error).__name__}: {result.error}"
    return [(list(h.token_ids), [round(value, 7) for value in h.logprobs or ()]) for h in result.hypotheses]


def _excuse(subject: Subject) -> str | None:
    if not subject.kind.constraint:
        return "it is no constraint"
    if not subject.has("logits_transform"):
        return "it is a constraint that forbids nothing: it has no logits_transform"
    return "it is a strategy, whose own transform acts last" if subject.is_strategy else None


CONSTRAINT = Law(
    "constraint",
    "A constraint forbids before all others, and only forbids; what it allows its path state takes; texts are in its "
    "language, and everything in its language can come.",
    "A grammar that lets one token through makes output that no parser reads; one that forbids too much bends the "
    "distribution, and nobody sees it. Usual causes: a mask one token late, an end that is allowed where the text is "
    "not complete, a `may stop` taken for `has stopped`, a mask and an `advance` that were written apart, a dead end "
    "that is papered over with some token.",
    check_of(check_constraint),
    _cases,
    _excuse,
    examples=60,
)
