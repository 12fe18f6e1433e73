"""Runs requests through the loop under circumstances, good or bad, and checks that nothing is left behind.

Circumstances are what a result must not depend on: who else is there, who came first, how many slots and tokens there
are to share. `drive` brings requests to their ends under them; `alone` gives each one all that it could wish.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unspool.errors import AdmissionError
from unspool.lane import Lane, Track
from unspool.live import Live
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.prefixes import Prefix
from unspool.request import Limits, PreparedRequest, Result
from unspool.runner import Batch, ModelRunner, Output
from unspool.trace import Recorder
from unspool.tree import NONE
from unspool_testing.table import CacheError, TableModel

MOST_STEPS = 1000


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
        prefix_cache: prompts that have run are kept for others that begin alike.
    """

    slots: int = 4096
    token_budget: int = 512
    max_running: int = 256
    arrivals: Sequence[int] = ()
    cancels: Mapping[int, int] = field(default_factory=dict)
    preempts: frozenset[int] = frozenset()
    prefix_cache: bool = True


GOOD = Circumstances()
"""Room for all, and nobody is disturbed."""

Models = Mapping[str, ModelRunner]
"""The models that companions may name."""

Record = dict[str, Any]
"""One record of a trace, as `unspool.trace` writes it."""


@dataclass
class Run:
    """One run that `recording` has noted: its trace, and what it was called."""

    name: str
    records: list[Record] = field(default_factory=list)


_RUNS: ContextVar[list[Run] | None] = ContextVar("runs", default=None)


@contextmanager
def recording() -> Iterator[list[Run]]:
    """Trace all runs while the context lasts."""
    runs: list[Run] = []
    token = _RUNS.set(runs)
    try:
        yield runs
    finally:
        _RUNS.reset(token)


def drive(
    runner: ModelRunner,
    requests: Sequence[PreparedRequest],
    circumstances: Circumstances = GOOD,
    models: Models | None = None,
    watch: Callable[[Loop], None] = lambda loop: None,
    name: str = "",
) -> list[Result]:
    """Run requests to their ends. Return their results in order.

    After each step what free slots hold is forgotten, where the model can, and `watch` sees the loop. `name` is what
    an account of the run calls it.

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
        prefix_cache=circumstances.prefix_cache,
        finished=finished,
    )
    if (runs := _RUNS.get()) is not None:
        runs.append(Run(name))
        loop.recorder = Recorder(runs[-1].records.append)
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
            check_holdings(loop)
            watch(loop)
    assert len(results) == len(requests), f"requests {sorted(set(range(len(requests))) - set(results))} did not end"
    check_conservation(loop)
    return [results[number] for number in range(len(requests))]


def alone(runner: ModelRunner, requests: Sequence[PreparedRequest], models: Models | None = None) -> list[Result]:
    """Run each request by itself, with room for all that it wants."""
    return [drive(runner, [request], models=models, name=f"request {request.id} alone")[0] for request in requests]


def least_slots(runner: ModelRunner, requests: Sequence[PreparedRequest], models: Models | None = None) -> int:
    """Say how many slots a pool must have so that each request can run in it alone.

    It is measured: the most that any model's pool holds in a pass of a run alone, and what admission asks for. Where
    there is little room for guesses, branches move side by side, and may hold more than when guesses help one of them
    on; so a drafting pipeline gets what it takes with its guesses and, in each of its lanes, what it takes without.
    """
    most = 1
    for request in requests:
        need = _peak(runner, request, models or {})
        if plain := _without_guesses(request):
            need += (1 + len(request.pipeline.companions)) * _peak(runner, plain, models or {})
        most = max(most, need)
    return most


def _peak(runner: ModelRunner, request: PreparedRequest, models: Models) -> int:
    most = 0

    def look() -> None:
        nonlocal most
        most = max([most, *(cache.pool.size - cache.free for cache in loop.lanes._caches.values())])

    others = {name: _Watched(model, look) for name, model in models.items()}
    loop = Loop(_Watched(runner, look), GOOD.slots, models=others.__getitem__)
    try:
        loop.submit(request)
    except AdmissionError:
        return 0
    most = _admitted_with(loop, request)
    while loop.busy:
        loop.step()
        check_holdings(loop)  # what is broken here might go on for ever
    return most


def _without_guesses(request: PreparedRequest) -> PreparedRequest | None:
    pipeline = request.pipeline
    rest = [plugin for plugin in pipeline.plugins[:-1] if plugin.constraint or not hasattr(plugin, "pre_forward")]
    if len(rest) == len(pipeline.plugins) - 1:
        return None
    return replace(request, pipeline=Pipeline(pipeline.strategy, rest))


def _admitted_with(loop: Loop, request: PreparedRequest) -> int:
    """Say how many slots of one model admission wants for a request (see `Scheduler.refuse`)."""
    starts, new = request.pipeline.strategy.start(request), request.limits.max_new_tokens
    needs: dict[int, int] = {}
    for lane, prompt in loop.scheduler.prompts(request).items():
        needs[id(lane.cache)] = needs.get(id(lane.cache), 0) + len(prompt) + max(1, starts) * (new - 1)
    return max(needs.values())


class _Watched:
    """Passes everything on, and calls somebody before each pass, when all its slots are taken."""

    def __init__(self, runner: ModelRunner, look: Callable[[], None]) -> None:
        self._runner, self._look = runner, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Batch) -> Output:
        self._look()
        return self._runner.forward(batch)


def check_holdings(loop: Loop) -> None:
    """Check that a loop, between two steps, holds what its requests need and nothing else.

    Raises:
        AssertionError: a slot without an owner or with two, a node without a branch, a count that is wrong.
    """
    tree, lives = loop.tree, [*loop.scheduler.running, *loop.scheduler.waiting]
    wanted: set[int] = set()
    for live in lives:
        ends = [live.root, *(branch.node for branch in live.branches)]
        ends += [draft for branch in live.branches if branch.held for draft in branch.held.drafts]
        for end in ends:
            node = end
            while node != NONE and node not in wanted:
                wanted.add(node)
                node = tree.parent[node]
        assert not live.drafts, f"request {live.request.id} keeps drafts {live.drafts} between steps"
    assert len(tree) == len(wanted), f"the tree has {len(tree)} nodes, and {len(wanted)} are needed"
    lanes = [loop.main, *loop.lanes.companions.values()]
    for cache in {id(lane.cache): lane.cache for lane in lanes}.values():
        slots, given_up = list[int](), 0
        for lane in (lane for lane in lanes if lane.cache is cache):
            tracks = [live.tracks[lane] for live in lives if lane in live.tracks]
            slots += [slot for track in tracks for slot in track.slots[track.shared : track.done].tolist()]
            kept, idle = _kept_by(lane, tracks)
            slots += kept
            given_up += idle
            roots = {live.root for live in lives}
            slots += [slot for node, slot in lane.slot.items() if node not in roots]
            stray = [node for node in lane.slot if node not in wanted]
            assert not stray, f"nodes {stray} have slots and belong to nobody"
        assert len(set(slots)) == len(slots), f"a slot has two owners: {sorted(slots)}"
        used = cache.pool.size - cache.pool.free
        assert len(slots) == used, f"{used} slots are taken and {len(slots)} have an owner"
        assert cache.kept.idle == given_up, f"{given_up} slots could be given up, and {cache.kept.idle} are counted"


def _kept_by(lane: Lane, tracks: Sequence[Track]) -> tuple[list[int], int]:
    """List the slots of a lane's tree of prompts, and count those that are idle. It must know who counts on which."""
    if lane.prefixes is None:
        return [], 0
    counted: Counter[Prefix] = Counter()
    for track in tracks:
        path, at = [], track.prefix
        while at is not None and at.above is not None:
            counted[at] += 1
            path.append(at)
            at = at.above
        slots = [slot for piece in reversed(path) for slot in piece.slots.tolist()]
        assert slots == track.slots[: track.shared].tolist(), "a request counts on other slots than it reads"
    pieces = [lane.prefixes.top]
    for piece in pieces:
        pieces += piece.below.values()
    everything = dict.fromkeys([*pieces[1:], *counted])
    for piece in everything:
        assert piece.users == counted[piece], f"{counted[piece]} requests count on a prefix, and it knows {piece.users}"
    idle = sum(len(piece.slots) for piece in everything if not piece.users)
    return [slot for piece in everything for slot in piece.slots.tolist()], idle


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
        assert lane.cache.free == pool.size, f"{pool.size - lane.cache.free} slots are left"
        if lane.prefixes is not None:
            lane.prefixes.drop()
    for lane in [loop.main, *loop.lanes.companions.values()]:
        pool = lane.cache.pool
        assert pool.free == pool.size, f"{pool.size - pool.free} slots are left"
        assert not pool._claimed.any(), "claims are left"
        assert not lane.slot and not lane._owner and not lane._trails, "nodes of a lane are left"


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
