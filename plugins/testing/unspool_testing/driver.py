"""Runs requests through the loop under circumstances, good or bad, and checks that nothing is left behind.

Circumstances are what a result must not depend on: who else is there, who came first, how many slots and tokens there
are to share. `drive` brings requests to their ends under them; `alone` gives each one all that it could wish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unspool.errors import AdmissionError
from unspool.live import Live
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Limits, PreparedRequest, Result
from unspool.runner import ModelRunner
from unspool_testing.table import CacheError, TableModel

MOST_STEPS = 5000


@dataclass(frozen=True)
class Circumstances:
    """What a run has to cope with.

    Args:
        slots: of the pool, of each model.
        token_budget: most tokens of a pass.
        max_running: most requests that are admitted at once.
        arrivals: the step before which each request is submitted; 0 where the list is too short. Equal steps keep the
            order of the requests.
        cancels: request -> after how many steps since it was submitted it is cancelled.
        preempts: steps before which the youngest running request loses its slots.
    """

    slots: int = 4096
    token_budget: int = 512
    max_running: int = 256
    arrivals: Sequence[int] = ()
    cancels: Mapping[int, int] = field(default_factory=dict)
    preempts: frozenset[int] = frozenset()


GOOD = Circumstances()
"""Room for all, and nobody is disturbed."""

Models = Mapping[str, ModelRunner]
"""The models that companions may name."""


def drive(
    runner: ModelRunner,
    requests: Sequence[PreparedRequest],
    circumstances: Circumstances = GOOD,
    models: Models | None = None,
    watch: Callable[[Loop], None] = lambda loop: None,
) -> list[Result]:
    """Run requests to their ends. Return their results in order.

    After each step what free slots hold is forgotten, where the model can, and `watch` sees the loop.

    Raises:
        AssertionError: a slot, a node, a state or a lane is left at the end, some request ended twice or never, or an
            exact model met a `CacheError`.
    """
    results: dict[int, Result] = {}
    numbers: dict[Live, int] = {}

    def finished(live: Live) -> None:
        assert live.result is not None
        assert numbers[live] not in results, f"request {numbers[live]} ended twice"
        assert CacheError.__name__ not in str(live.result.error), str(live.result.error)
        results[numbers[live]] = live.result

    at_hand = dict(models or {})
    loop = Loop(
        runner,
        circumstances.slots,
        token_budget=circumstances.token_budget,
        max_running=circumstances.max_running,
        models=lambda name: at_hand[name],
        finished=finished,
    )
    arrivals = [*circumstances.arrivals, *[0] * len(requests)][: len(requests)]
    coming = sorted(range(len(requests)), key=lambda i: arrivals[i])
    since: dict[int, int] = {}
    for step in range(MOST_STEPS):
        while coming and (arrivals[coming[0]] <= step or not loop.busy):
            number = coming.pop(0)
            try:
                live = loop.submit(requests[number])
            except AdmissionError as error:
                results[number] = Result(requests[number].id, "", requests[number].prompt_ids, error=error)
                continue
            numbers[live], since[number] = number, step
        for live, number in list(numbers.items()):
            if number not in results and step - since[number] == circumstances.cancels.get(number):
                loop.cancel(live)
        if step in circumstances.preempts and loop.scheduler.running:
            loop.scheduler.preempt(max(loop.scheduler.running, key=lambda live: live.order))
        if not coming and not loop.busy:
            break
        if loop.busy:
            loop.step()
            _poison(loop)
            watch(loop)
    assert len(results) == len(requests), f"requests {sorted(set(range(len(requests))) - set(results))} did not end"
    check_conservation(loop)
    return [results[number] for number in range(len(requests))]


def alone(runner: ModelRunner, requests: Sequence[PreparedRequest], models: Models | None = None) -> list[Result]:
    """Run each request by itself, with room for all that it wants."""
    return [drive(runner, [request], models=models)[0] for request in requests]


def check_conservation(loop: Loop) -> None:
    """Check that a loop in which every request has ended holds nothing any more.

    Raises:
        AssertionError: it does; the message says what.
    """
    assert not loop.busy, "requests are left"
    assert len(loop.tree) == 0, f"{len(loop.tree)} nodes are left"
    assert not any(loop.tree.states), "path states are left"
    assert not any(text is not None for text in loop.tree.text), "states of text are left"
    for lane in [loop.main, *loop.lanes.companions.values()]:
        pool = lane.cache.pool
        assert pool.free == pool.size, f"{pool.size - pool.free} slots are left"
        assert not pool._claimed.any(), "claims are left"
        assert not lane.slot and not lane._owner and not lane._segments, "nodes of a lane are left"


def request(
    pipeline: Pipeline,
    prompt: Sequence[int] = (1,),
    *,
    max_new_tokens: int = 8,
    min_new_tokens: int = 0,
    deadline: float | None = None,
    end_ids: Sequence[int] = (0,),
    parameters: Mapping[str, Any] | None = None,
    **fields: Any,
) -> PreparedRequest:
    """Prepare a request by hand.

    Args:
        pipeline: what decodes it.
        prompt: token ids.
        max_new_tokens: as in `Limits`, like the two after it.
        min_new_tokens: see there.
        deadline: see there.
        end_ids: token ids that end a text.
        parameters: plugin name -> parameters of this request alone, which replace the plugin's own.
        fields: anything else that a `PreparedRequest` has.
    """
    own = {**pipeline.parameters, **(parameters or {})}
    limits = Limits(max_new_tokens, min_new_tokens, (), deadline)
    prepared = PreparedRequest("", tuple(prompt), pipeline, own, limits, tuple(end_ids))
    return replace(prepared, **{"id": f"seed {fields.get('seed', 0)}", **fields})


def plugin(kind: type[Plugin], name: str | None = None, **params: Any) -> Plugin:
    """Make a plugin by hand, named after its class unless `name` is given."""
    made = kind(kind.Params(**params))
    made.name = name or kind.__name__.lower()
    return made


def _poison(loop: Loop) -> None:
    for lane in [loop.main, *loop.lanes.companions.values()]:
        if isinstance(lane.cache.runner, TableModel):
            lane.cache.runner.poison(np.flatnonzero(~lane.cache.pool._used))
