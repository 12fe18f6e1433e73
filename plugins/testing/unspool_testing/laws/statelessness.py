"""A plugin keeps nothing to itself: what a request comes to is decided by the request and its seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from unspool_testing.case import Case
from unspool_testing.compare import difference, with_pipeline
from unspool_testing.driver import drive
from unspool_testing.generators import models, requests
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    first = draw(requests(subject, model))
    others = draw(st.lists(requests(subject, model, pipeline=(first.strategy, first.plugins)), min_size=1, max_size=2))
    return Case(subject=subject.name, model=model, requests=(first, *others))


@check_of
def check_statelessness(case: Case, known: Known) -> None:
    """Run one request, then others, then the first again on the same plugin objects, under other global seeds."""
    runner, models_ = case.model.runner(), case.model.companions()
    first, *others = case.prepared(known)
    subject = next(plugin for plugin in first.pipeline.plugins if plugin.name == case.subject)
    mine = _contents(subject)
    with torch.random.fork_rng(devices=[]):
        _seed(1)
        before = drive(runner, [first], models=models_, name="the first time")[0]
        if touched := _touched(1):
            raise Broken(f"the run drew from the global generator of {touched}")
        for other in others:
            drive(runner, [with_pipeline(other, first.pipeline)], models=models_)
        _seed(2)
        after = drive(runner, [first], models=models_, name="after other requests")[0]
    lawful_end(before)
    if parts := difference(before, after):
        raise Broken(f"the same request before and after others, with another global seed: {parts}")
    if (now := _contents(subject)) != mine:
        raise Broken(f"the plugin object changed: it held {mine}, and now {now}")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _touched(seed: int) -> str | None:
    """Say which global generator is no longer where `_seed` left it."""
    generators: dict[str, Callable[[], Any]] = {
        "random": random.getstate,
        "numpy": lambda: str(np.random.get_state()),
        "torch": lambda: torch.get_rng_state().tolist(),
    }
    states = {name: state() for name, state in generators.items()}
    _seed(seed)
    return next((name for name, state in generators.items() if state() != states[name]), None)


def _contents(plugin: object) -> Any:
    """Describe what an object holds."""
    return {name: f"{value!r} {getattr(value, '__dict__', '')}" for name, value in vars(plugin).items()}


STATELESSNESS = Law(
    "statelessness",
    "A request gives the same on a plugin object that served others before, whatever the global random seeds are, and "
    "leaves both as they were.",
    "One object serves many requests at once. What it keeps on itself leaks from one to the next; what it draws from a "
    "global generator cannot be drawn again. Usual causes: `torch.rand` or `torch.multinomial` instead of "
    "`step.uniform` and `step.gumbel`; a counter or a cache on `self` that is not keyed by the path.",
    check_statelessness,
    _cases,
    examples=40,
)
