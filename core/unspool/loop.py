"""The core loop: one step moves every live request on, whatever its strategy.

    cancel, admit, preempt, choose      the scheduler (`schedule.py`)
    pre_forward                         plugins hang drafts below branches (`drafting.py`)
    the pass                            all nodes not yet run, of all requests, in one packed forward (`forward.py`)
    rounds                              logits_transform, select, stop_check (`decide.py`), grow (`grow.py`)
    prune                               what no branch needs is free; who has no branch has ended (`lifecycle.py`)

The loop knows no strategy. It is not thread-safe: `engine.py` gives it a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unspool.drafting import Drafting
from unspool.forward import Forward
from unspool.group import Group
from unspool.lanes import Lanes
from unspool.lifecycle import Lifecycle
from unspool.live import Live
from unspool.request import PreparedRequest
from unspool.rounds import Rounds
from unspool.runner import ModelRunner
from unspool.schedule import Plan, Scheduler, Short
from unspool.stop_text import StopText
from unspool.text import Detokenizer
from unspool.trace import Recorder


class Loop:
    """Runs requests step by step over one target model.

    Args:
        runner: the target.
        slots: size of its pool of cache slots (and of each companion model's).
        token_budget: most tokens of a pass.
        max_running: most requests that are admitted at once.
        models: loads a companion's model by name.
        prefix_cache: keep prompts that have run, for others that begin alike.
        detokenizer: for texts and stop strings; None where the model has no tokenizer.
        finished: called with each request that has ended, its result in `live.result`.
        progressed: called after each step with the requests that had rows.
    """

    def __init__(
        self,
        runner: ModelRunner,
        slots: int,
        *,
        token_budget: int = 512,
        max_running: int = 256,
        models: Callable[[str], ModelRunner] | None = None,
        prefix_cache: bool = True,
        detokenizer: Detokenizer | None = None,
        finished: Callable[[Live], None] = lambda live: None,
        progressed: Callable[[Sequence[Live]], None] = lambda lives: None,
    ) -> None:
        self.lanes = Lanes(runner, slots, models, prefix_cache=prefix_cache)
        self.tree, self.main = self.lanes.tree, self.lanes.main
        self.scheduler = Scheduler(self.tree, self.main, self.lanes.of, token_budget, max_running)
        self.recorder: Recorder | None = None
        self.steps = 0
        self._stop_text = StopText(self.tree, detokenizer)
        self._lifecycle = Lifecycle(self.main, self.scheduler, finished, detokenizer)
        self._forward = Forward(self.main, self.scheduler, self._lifecycle.fail)
        self._drafting = Drafting(self._forward, self._lifecycle.fail)
        self._progressed = progressed

    def submit(self, request: PreparedRequest) -> Live:
        """Queue a request.

        Raises:
            AdmissionError: it can never run here.
            PluginError: one of its plugins does not let it begin.
        """
        return self._lifecycle.begin(request)

    def cancel(self, live: Live) -> None:
        """End a request now, as it is."""
        self._lifecycle.cancel(live)

    def abandon(self, error: Exception) -> None:
        """End all requests with an error."""
        for live in [*self.scheduler.running, *self.scheduler.waiting]:
            self._lifecycle.fail(live, error)

    @property
    def busy(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> None:
        """Move every request that fits by one step."""
        self.tree.recycle()
        plan = self._plan()
        groups = self._groups(plan)
        self._drafting.hang(plan, groups)
        self._forward.run(plan, groups)
        for group in groups:
            Rounds(group, self._lifecycle.fail, self._stop_text).run()
        self._drafting.learn(plan)
        for group in groups:
            if group.recorder:
                group.recorder.prune(group)
            if group.drafts:
                for live in group.lives:
                    group.forget_drafts_of(live)
        for live in plan.ready:
            if live.result is None and not live.branches:
                self._lifecycle.end(live)
        self._progressed(plan.ready)
        self.steps += 1

    def _plan(self) -> Plan:
        while True:
            try:
                return self.scheduler.plan()
            except Short as short:
                self._lifecycle.fail(short.live, short.error)

    def _groups(self, plan: Plan) -> list[Group]:
        by_key: dict[str, list[Live]] = {}
        for live in plan.ready:
            by_key.setdefault(live.request.pipeline.key, []).append(live)
        budget, most = plan.draft_budget, self.scheduler.token_budget
        groups, recorder = [], self.recorder  # which may come or go while a step runs
        for lives in by_key.values():
            first = lives[0].request
            lanes = self.lanes.of(first)
            groups.append(Group(first.pipeline, lives, self.main, lanes, budget, most, self._drafting.worth, recorder))
        if recorder:
            recorder.step(self.steps, groups)
        return groups
