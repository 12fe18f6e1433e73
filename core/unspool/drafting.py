"""Drafting: plugins hang drafts below branches (`pre_forward`), and those that are worth their rows stay (`worth.py`).

A plugin that raises fails its own requests alone. A companion may be short of slots for what it is asked: guesses do
without it, and for a strategy's own drafts others make way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from unspool.errors import PluginError, UnspoolError
from unspool.forward import Forward
from unspool.group import Group
from unspool.lane import NoSlots
from unspool.live import Live
from unspool.schedule import Plan
from unspool.step import Step
from unspool.worth import Worth


class Drafting:
    """Has drafts hung, and learns what came of them.

    Args:
        forward: makes way for drafts of strategies.
        fail: what to do with a request that fails.
    """

    def __init__(self, forward: Forward, fail: Callable[[Live, Exception], None]) -> None:
        self.worth = Worth()
        self._forward, self._fail = forward, fail
        self._began: float | None = None
        """When the pass began; None: nobody drafts in this step."""
        self._took = 0.0
        """Seconds in which drafts were hung."""

    def hang(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Call pre_forward of all groups, and delete the drafts that would cost more than they are likely to save."""
        self._began = None
        if any(group.pipeline.drafts for group in groups):
            start = time.perf_counter()
            self.worth.begin(plan, groups)
            for group in groups:
                if group.pipeline.drafts:
                    self._hang_below(plan, groups, group)
            self.worth.keep_the_best()
            self._began = time.perf_counter()
            self._took = self._began - start

    def learn(self, plan: Plan) -> None:
        """Learn from the step, after its rounds."""
        if self._began is not None:
            self.worth.learn(plan, self._took, time.perf_counter() - self._began)

    def _hang_below(self, plan: Plan, groups: Sequence[Group], group: Group) -> None:
        """Call pre_forward for the group; if a plugin raises, for each request alone, so that only its own fail."""
        try:
            self._call(plan, groups, group, group.lives)
        except Exception:
            for live in group.lives:
                group.forget_drafts_of(live)
            for live in list(group.lives):
                try:
                    self._call(plan, groups, group, [live])
                except Exception as error:
                    group.forget_drafts_of(live)
                    self._fail(live, error)
            group.lives = [live for live in group.lives if live.result is None]
        group.give_up_idle_guesses()
        group.trim()

    def _call(self, plan: Plan, groups: Sequence[Group], group: Group, lives: Sequence[Live]) -> None:
        """Call pre_forward for requests of a group, again if others had to make way for a companion's slots."""
        while lives := [live for live in lives if live in group.lives]:
            step = Step(group, group.rows(lives))
            try:
                for plugin, hook in group.pipeline.implementations("pre_forward"):
                    step.calls_for(plugin)
                    try:
                        hook(step=step)
                    except (UnspoolError, NoSlots):
                        raise
                    except Exception as error:
                        raise PluginError(plugin.name, "pre_forward", f"{type(error).__name__}: {error}") from error
                return
            except NoSlots as short:
                for live in lives:
                    group.forget_drafts_of(live)
                if not hasattr(group.pipeline.strategy, "pre_forward"):
                    return
                self._forward.make_way(plan, groups, short.cache, short.need)
