"""Law 4: a row is a function of its path, whatever the tree around it; so is a path's state."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.request import PreparedRequest
from unspool.step import Step
from unspool_testing.case import Case, circumstances
from unspool_testing.compare import with_pipeline
from unspool_testing.driver import drive
from unspool_testing.generators import bears, models, requests, schedules
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject
from unspool_testing.table import Path

DRAFTERS = (None, "kit_chains", "kit_trees")
TOLERANCE = 1e-9


class Witness(Plugin):
    """Stand last among the plugins, and remember each row as the transforms left it, by request, stream and path."""

    row_local = True
    hidden = (-1,)
    """So that it does not stand in `propose` and `transformed`, which ask what would be were a drafter the model."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.seen: dict[tuple[str, int, Path], Tensor] = {}
        self.parted: str | None = None

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Compare each row with what the same path gave before."""
        ids, lengths = step.paths()
        rows = zip(step.request.tolist(), step.stream.tolist(), ids.tolist(), lengths.tolist(), logits, strict=True)
        for request, stream, path, length, row in rows:
            place = step.requests[request].id, stream, tuple(path[:length])  # noise belongs to a stream
            before = self.seen.setdefault(place, row.clone())
            same = torch.allclose(row, before, rtol=0, atol=TOLERANCE, equal_nan=True)
            if not same and self.parted is None:
                self.parted = f"request {place[0]}, path {list(place[2])}: {_told(before)}, and later {_told(row)}"


class StateKeeper:
    """Watches a plugin fold its states: each fold must give what it gave before, and leave its argument as it was."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin, self._initial, self._advance = plugin, plugin.initial, plugin.advance
        self.broken: str | None = None

    def __enter__(self) -> StateKeeper:
        self._plugin.initial = self.initial  # type: ignore[method-assign]
        self._plugin.advance = self.advance  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        del self._plugin.initial, self._plugin.advance

    def initial(self, request: PreparedRequest) -> Any:
        """Ask twice."""
        first, second = self._initial(request), self._initial(request)
        if not _equal(first, second):
            self.broken = f"initial gave {first!r}, and for the same request {second!r}"
        return first

    def advance(self, state: Any, token: int, logprob: float = 0.0) -> Any:
        """Fold twice, the second time on a copy."""
        arguments = (token, logprob) if self._plugin.reads_logprob else (token,)
        before = copy.deepcopy(state)
        after = self._advance(state, *arguments)
        if not _equal(state, before):
            self.broken = f"advance by {token} changed the state that it was given, {before!r}, to {state!r}"
        elif not _equal(after, again := self._advance(before, *arguments)):
            self.broken = f"advance of {state!r} by {token} gave {after!r}, and then {again!r}"
        return after


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model))
    return Case(subject=subject.name, model=model, requests=(asked,), schedule=draw(schedules(3, quiet=False)))


@check_of
def check_path_purity(case: Case, known: Known) -> None:
    """Run the same request with all kinds of drafts, twice beside itself, and compare its rows by their paths."""
    runner, models_ = case.model.runner(), case.model.companions()
    [request] = case.prepared(known)
    pipeline = request.pipeline
    witness = Witness(Witness.Params())
    witness.name = "witness"
    others = [plugin for plugin in pipeline.plugins if not hasattr(plugin, "select")]
    subject = next(plugin for plugin in pipeline.plugins if plugin.name == case.subject)
    keeps = type(subject).initial is not Plugin.initial
    keeper = StateKeeper(subject)
    for drafter in DRAFTERS:
        if drafter and not bears(known, case.requests[0], drafter):
            continue
        guesses = [known.plugin({drafter: {"vocab_size": case.model.vocab_size}})] if drafter else []
        watched = with_pipeline(request, Pipeline(pipeline.strategy, [*guesses, *others, witness]))
        with keeper if keeps else nullcontext():
            results = drive(runner, [watched] * 2, circumstances(case, [watched]), models_, name=f"with {drafter}")
        for result in results:
            lawful_end(result)
        if witness.parted:
            raise Broken(f"one path has two rows of logits: {witness.parted}")
        if keeper.broken:
            raise Broken(keeper.broken)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    try:
        return bool(one == other) or _parts(one) == _parts(other)
    except Exception:
        return _parts(one) == _parts(other)


def _parts(value: Any) -> str:
    """Give what an object holds, for classes that do not say when two are equal."""
    return repr(getattr(value, "__dict__", value))


def _told(row: Tensor) -> list[float]:
    return [round(value, 4) for value in row.tolist()]


def _excuse(subject: Subject) -> str | None:
    if subject.has("logits_transform") or subject.has_state or subject.is_strategy:
        return None
    return "it edits no logits and keeps no state along paths"


PATH_PURITY = Law(
    "path_purity",
    "The same path gives the same logits, however the tree around it looks, and `initial` and `advance` are pure.",
    "Drafts, forks and preemption show a plugin paths in any order, often twice. A transform that looks at anything "
    "but the row's path, or a state that is changed in place, gives a text that depends on luck. Usual causes: the "
    "last token of the request instead of the row's; a list in the state that `advance` appends to; padding of "
    "`step.paths()` read as tokens.",
    check_path_purity,
    _cases,
    _excuse,
    examples=40,
)
