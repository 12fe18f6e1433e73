"""The pass of a step: everything that runs, of all groups, packed into one forward a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from unspool.errors import ModelError
from unspool.group import Group
from unspool.lane import Cache, Lane, Share, run_together
from unspool.live import Live
from unspool.schedule import Plan, Scheduler, Short


class Forward:
    """Runs passes.

    Args:
        main: the target's lane.
        scheduler: knows what each request has to run.
        fail: what to do with a request that fails.
    """

    def __init__(self, main: Lane, scheduler: Scheduler, fail: Callable[[Live, Exception], None]) -> None:
        self._main, self._scheduler, self._fail = main, scheduler, fail

    def run(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Run pieces of prompts and all rows and drafts of all groups, by the target and by companions of every row."""
        now = time.monotonic()
        self._make_sure_of_slots(plan, groups)
        for lanes in self._passes(plan, groups):
            shares = {lane: self._shares(plan, groups, lane) for lane in lanes}
            shares = {lane: own for lane, own in shares.items() if own}
            if not shares:
                continue
            hidden = {layer for group in groups for layer in group.pipeline.hidden} if self._main in shares else ()
            try:
                readings = run_together(shares, sorted(hidden))
            except Exception as error:  # such as too little memory for this batch: those that wait go on
                fault = ModelError(f"the forward pass failed: {type(error).__name__}: {error}")
                for live in dict.fromkeys(share.live for own in shares.values() for share in own):
                    self._fail(live, fault)
                for group in groups:
                    group.lives = [live for live in group.lives if live.result is None]
                continue
            for lane, said in readings.items():
                for group in groups:
                    group.read(lane, said)
            for share in shares.get(self._main, ()):
                counts = share.live.counts
                counts.forward_passes += 1
                counts.rows += share.tokens
                counts.started = counts.started or now
        for group in groups:
            if group.readings is None and group.lives:  # rows that are all held, with no draft to run
                group.read_nothing()

    def _passes(self, plan: Plan, groups: Sequence[Group]) -> list[list[Lane]]:
        """Say which lanes run, the target's first: those of one model and as many layers run in one pass."""
        beside = [lane for group in groups for lane in group.beside()]
        passes: dict[tuple[Cache, int | None], list[Lane]] = {}
        for lane in dict.fromkeys([self._main, *beside, *(lane for lane, _ in plan.pieces)]):
            passes.setdefault((lane.cache, lane.layers), []).append(lane)
        return list(passes.values())

    def _shares(self, plan: Plan, groups: Sequence[Group], lane: Lane) -> list[Share]:
        shares = [piece for where, piece in plan.pieces if where is lane and piece.live.result is None]
        for group in groups:
            if lane is self._main or lane in group.beside():
                shares += [self._share(group, live, lane) for live in group.lives]
        return [share for share in shares if share.tokens]

    def _share(self, group: Group, live: Live, lane: Lane) -> Share:
        drafts = group.running_drafts(live) if group.drafts else ()
        if lane is self._main:
            live.counts.drafted += sum(not group.drafts[node].held for node in drafts)
        return self._scheduler.share(live, lane, drafts)

    def _make_sure_of_slots(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Make room for drafts that strategies hung over the budget."""
        while any(group.drafts for group in groups):
            needs: dict[Cache, int] = {}
            for lane, piece in plan.pieces:
                needs[lane.cache] = needs.get(lane.cache, 0) + piece.new_slots(lane)
            for group in groups:
                for live in group.lives:
                    shares, asked = self._scheduler.shares(live, group.running_drafts(live))
                    for lane, share in [*shares, *asked]:
                        needs[lane.cache] = needs.get(lane.cache, 0) + share.new_slots(lane)
            short = [cache for cache, need in needs.items() if need > cache.free]
            if not short:
                return
            self.make_way(plan, groups, short[0], needs[short[0]])

    def make_way(self, plan: Plan, groups: Sequence[Group], cache: Cache, need: int) -> None:
        """Free slots for drafts of strategies: guesses go first; then the youngest waits, or fails if it is alone."""
        if any(group.give_up_guesses() for group in groups):
            return
        youngest = max(self._scheduler.running, key=lambda live: live.order)
        for group in groups:
            if youngest in group.lives:
                group.forget_drafts_of(youngest)
                group.lives.remove(youngest)
        plan.pieces = [(lane, piece) for lane, piece in plan.pieces if piece.live is not youngest]
        if len(self._scheduler.running) == 1:
            self._fail(youngest, Short(youngest, need, cache).error)
        else:
            self._scheduler.preempt(youngest)
