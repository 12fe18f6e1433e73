"""The core loop: one step moves every live request on, whatever its strategy.

    cancel, admit, preempt, choose      the scheduler (`schedule.py`)
    pre_forward                         plugins hang drafts below branches
    the pass                            all nodes not yet run, of all requests, in one packed forward
    rounds                              logits_transform, select, stop_check (`decide.py`), grow (`grow.py`)
    prune                               what no branch needs is free; who has no branch has ended

The loop knows no strategy. It is not thread-safe: `engine.py` gives it a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unspool.errors import ConfigError, DeadEnd, ModelError, PluginError, Problem, UnspoolError
from unspool.group import Group
from unspool.lane import Cache, Lane, Share
from unspool.live import Branch, Live, logprob_list
from unspool.plugin import Plugin
from unspool.request import Hypothesis, PreparedRequest, Result
from unspool.rounds import Rounds
from unspool.runner import ModelRunner
from unspool.schedule import Plan, Scheduler, Short
from unspool.slots import SlotPool
from unspool.step import Step
from unspool.stop_text import StopText
from unspool.text import Detokenizer
from unspool.trace import Recorder
from unspool.tree import Tree


class Loop:
    """Runs requests step by step over one target model.

    Args:
        runner: the target.
        slots: size of its pool of cache slots (and of each companion model's).
        token_budget: most tokens of a pass.
        max_running: most requests that are admitted at once.
        models: loads a companion's model by name.
        detokenizer: for stop strings; None where the model has no tokenizer.
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
        detokenizer: Detokenizer | None = None,
        finished: Callable[[Live], None] = lambda live: None,
        progressed: Callable[[Sequence[Live]], None] = lambda lives: None,
    ) -> None:
        self.tree = Tree(self._free)
        self.lanes: dict[tuple[str, str | None, int | None], Lane] = {}
        self.main = Lane(self.tree, self._cache(runner, slots))
        self._caches: dict[str | None, Cache] = {None: self.main.cache}
        self._models, self._slots = models, slots
        self.stop_text = StopText(self.tree, detokenizer)
        self.scheduler = Scheduler(self.tree, self.main, self.lanes_of, token_budget, max_running)
        self.recorder: Recorder | None = None
        self.steps = 0
        self._order = 0
        self._finished, self._progressed = finished, progressed

    # ---- requests come and go ---------------------------------------------------------------------------------------

    def submit(self, request: PreparedRequest) -> Live:
        """Queue a request.

        Raises:
            AdmissionError: it can never run here.
            PluginError: one of its plugins does not let it begin.
        """
        pipeline = request.pipeline
        starts = _ask(pipeline.strategy, "start", request)
        if not isinstance(starts, int) or starts < 1:
            raise PluginError(pipeline.strategy.name, "start", f"it must say how many branches, not {starts!r}")
        lengths = {lane: len(prompt) for lane, prompt in self.scheduler.prompts(request).items()}
        if refusal := self.scheduler.refuse(request, lengths):
            raise refusal
        states = tuple(_ask(plugin, "initial", request) for plugin in pipeline.stateful)
        live = Live(request, self._order, self.tree.root(request.prompt_ids))
        self.tree.states[live.root] = states
        for stream in range(starts):
            self.tree.hold(live.root)
            live.branches.append(Branch(live.root, stream, (0.0,)))
        try:
            for plugin in pipeline.owners:
                live.own[plugin.name] = _ask(plugin, "open", request)
        except PluginError as error:
            self._release(live)
            self._tell_end(live, self._result(live, (), error))
            raise
        self._order += 1
        self.main.cache.want(pipeline.path_hidden)
        self.scheduler.waiting.append(live)
        return live

    def cancel(self, live: Live) -> None:
        """End a request now: its branches become hypotheses as they are, ranked after finished ones."""
        if live.result is not None:
            return
        for branch in live.branches:
            live.hypotheses.append(
                Hypothesis(
                    self.tree.new_tokens(branch.node),
                    "cancelled",
                    branch.score[0] if self._scored(live) else None,
                    logprobs=logprob_list(branch.logprobs) if live.request.logprobs else None,
                    stream=branch.stream,
                )
            )
        self._end(live)

    def abandon(self, error: Exception) -> None:
        """End all requests with an error."""
        for live in [*self.scheduler.running, *self.scheduler.waiting]:
            self._fail(live, error)

    @property
    def busy(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move every request that fits by one step."""
        self.tree.recycle()
        plan = self._plan()
        groups = self._groups(plan)
        for group in groups:
            self._hang_drafts(group)
        self._run(plan, groups)
        for group in groups:
            Rounds(group, self._fail, self.stop_text).run()
            if group.recorder:
                group.recorder.prune(group)
            if group.drafts:
                for live in group.lives:
                    group.forget_drafts_of(live)
        for live in plan.ready:
            if live.result is None and not live.branches:
                self._end(live)
        self._progressed(plan.ready)
        self.steps += 1

    def _plan(self) -> Plan:
        while True:
            try:
                return self.scheduler.plan()
            except Short as short:
                self._fail(short.live, short.error)

    def _groups(self, plan: Plan) -> list[Group]:
        by_key: dict[str, list[Live]] = {}
        for live in plan.ready:
            by_key.setdefault(live.request.pipeline.key, []).append(live)
        budget, most = plan.draft_budget, self.scheduler.token_budget
        groups, recorder = [], self.recorder  # which may come or go while a step runs
        for lives in by_key.values():
            first = lives[0].request
            lanes = self.lanes_of(first)
            groups.append(Group(first.pipeline, lives, self.main, lanes, budget, most, recorder))
        if recorder:
            recorder.step(self.steps, groups)
        return groups

    def _hang_drafts(self, group: Group) -> None:
        """Call pre_forward for the group; if a plugin raises, for each request alone, so that only its own fail."""
        if not group.pipeline.drafts:
            return
        try:
            self._call_pre_forward(group, Step(group, group.rows()))
        except Exception:
            for live in group.lives:
                group.forget_drafts_of(live)
            for live in list(group.lives):
                step = Step(group, group.rows_of(live))
                try:
                    self._call_pre_forward(group, step)
                except Exception as error:
                    group.forget_drafts_of(live)
                    self._fail(live, error)
            group.lives = [live for live in group.lives if live.result is None]
        group.trim()

    @staticmethod
    def _call_pre_forward(group: Group, step: Step) -> None:
        for plugin, hook in group.pipeline.implementations("pre_forward"):
            step.calls_for(plugin)
            try:
                hook(step=step)
            except UnspoolError:
                raise
            except Exception as error:
                raise PluginError(plugin.name, "pre_forward", f"{type(error).__name__}: {error}") from error

    def _run(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Run the pass: pieces of prompts and all rows and drafts of all groups, then companions for every row."""
        now = time.monotonic()
        self._make_sure_of_slots(plan, groups)
        for lane in dict.fromkeys([self.main, *self._beside(groups), *(lane for lane, _ in plan.pieces)]):
            shares = [piece for where, piece in plan.pieces if where is lane and piece.live.result is None]
            hidden: set[int] = set()
            for group in groups:
                if lane is self.main or lane in group.beside():
                    shares += [self._share(group, live, lane) for live in group.lives]
                    hidden.update(group.pipeline.hidden if lane is self.main else ())
            shares = [share for share in shares if share.tokens]
            if not shares:
                continue
            try:
                readings = lane.run(shares, sorted(hidden))
            except Exception as error:  # such as too little memory for this batch: those that wait go on
                fault = ModelError(f"the forward pass failed: {type(error).__name__}: {error}")
                for share in shares:
                    self._fail(share.live, fault)
                for group in groups:
                    group.lives = [live for live in group.lives if live.result is None]
                continue
            for group in groups:
                group.read(lane, readings)
            if lane is self.main:
                for share in shares:
                    counts = share.live.counts
                    counts.forward_passes += 1
                    counts.rows += share.tokens
                    counts.started = counts.started or now
        for group in groups:
            if group.readings is None and group.lives:  # rows that are all held, with no draft to run
                group.read_nothing()

    def _share(self, group: Group, live: Live, lane: Lane) -> Share:
        share = self.scheduler.share(live, lane)
        if not group.drafts:
            return share
        drafts = group.running_drafts(live)
        if lane is self.main:
            live.counts.drafted += sum(not group.drafts[node].held for node in drafts)
        nodes = dict.fromkeys([*share.nodes, *drafts])
        return Share(live, share.prompt, share.ancestors, [n for n in nodes if n != live.root or not share.prompt])

    def _beside(self, groups: Sequence[Group]) -> list[Lane]:
        return [lane for group in groups for lane in group.beside()]

    def _make_sure_of_slots(self, plan: Plan, groups: Sequence[Group]) -> None:
        """Make room for drafts that strategies hung over the budget: the youngest request waits, or fails if alone."""
        while any(group.drafts for group in groups):
            needs: dict[Cache, int] = {}
            for lane, piece in plan.pieces:
                needs[lane.cache] = needs.get(lane.cache, 0) + piece.new_slots(lane)
            for group in groups:
                for live in group.lives:
                    drafts = len(group.running_drafts(live))
                    for lane in [self.main, *group.beside()]:
                        new = self.scheduler.share(live, lane).new_slots(lane) + drafts
                        needs[lane.cache] = needs.get(lane.cache, 0) + new
            short = [cache for cache, need in needs.items() if need > cache.pool.free]
            if not short:
                return
            youngest = max(self.scheduler.running, key=lambda live: live.order)
            for group in groups:
                if youngest in group.lives:
                    group.forget_drafts_of(youngest)
                    group.lives.remove(youngest)
            plan.pieces = [(lane, piece) for lane, piece in plan.pieces if piece.live is not youngest]
            if len(self.scheduler.running) == 1:
                self._fail(youngest, Short(youngest, needs[short[0]], short[0]).error)
            else:
                self.scheduler.preempt(youngest)

    # ---- the end of a request ---------------------------------------------------------------------------------------

    def _end(self, live: Live) -> None:
        """Rank the hypotheses, free everything, and hand the result over."""
        request = live.request
        if not live.hypotheses:
            self._fail(live, DeadEnd(live.dead_path or ()))
            return
        try:
            ranked = self._ranked(live)
        except PluginError as error:
            self._fail(live, error)
            return
        hypotheses = tuple(ranked[: request.n])
        self._close(live, self._result(live, hypotheses, None))

    def _ranked(self, live: Live) -> list[Hypothesis]:
        strategy = live.request.pipeline.strategy
        if live.request.pipeline.independent:
            return sorted(live.hypotheses, key=lambda h: (h.finish_reason == "cancelled", h.stream))
        done = [h for h in live.hypotheses if h.finish_reason != "cancelled"]
        cancelled = [h for h in live.hypotheses if h.finish_reason == "cancelled"]
        ranked = [h for part in (done, cancelled) if part for h in _ask(strategy, "rank", live.request, part)]
        if not all(isinstance(h, Hypothesis) for h in ranked) or not ranked:
            raise PluginError(strategy.name, "rank", "it must return hypotheses, at least one")
        return ranked

    def _fail(self, live: Live, error: Exception) -> None:
        """End a request with an error. Nobody else notices."""
        if live.result is None:
            self._close(live, self._result(live, (), error))

    @staticmethod
    def _result(live: Live, hypotheses: tuple[Hypothesis, ...], error: Exception | None) -> Result:
        request = live.request
        stats = live.stats(hypotheses)
        return Result(request.id, request.prompt, request.prompt_ids, hypotheses, stats, error, request.provenance)

    def _close(self, live: Live, result: Result) -> None:
        live.result = result
        self._release(live)
        if error := self._tell_end(live, result):
            live.result = self._result(live, (), error)
        self._finished(live)

    @staticmethod
    def _tell_end(live: Live, result: Result) -> PluginError | None:
        """Tell all plugins that opened something. Give the last one's error, if any raised."""
        failed = None
        for plugin in live.request.pipeline.owners:
            if plugin.name in live.own:
                try:
                    _ask(plugin, "close", live.own[plugin.name], result)
                except PluginError as error:
                    failed = error
        return failed

    def _release(self, live: Live) -> None:
        """Free all slots, nodes and states of a request."""
        for node in reversed(live.drafts):
            self.tree.release(node)
        live.drafts.clear()
        for branch in live.branches:
            for node in reversed(list(branch.held.drafts)) if branch.held else ():
                self.tree.release(node)
            self.tree.release(branch.node)
        live.branches.clear()
        self.tree.release(live.root)
        for lane in list(live.tracks):
            lane.leave(live, ())
        for queue in (self.scheduler.running, self.scheduler.waiting):
            if live in queue:
                queue.remove(live)

    @staticmethod
    def _scored(live: Live) -> bool:
        return live.request.pipeline.scores or live.request.logprobs is not None or live.scored

    # ---- lanes ------------------------------------------------------------------------------------------------------

    def lanes_of(self, request: PreparedRequest) -> Mapping[str, Lane]:
        """Give the lanes of a request's companions, by name, making those that are new."""
        lanes = {}
        for name, companion in request.pipeline.companions.items():
            key = name, companion.model, companion.layers
            if key not in self.lanes:
                cache = self._companion_cache(companion.model)
                layers = cache.runner.layers
                if companion.layers is not None and not 0 < companion.layers <= layers:
                    reason = f"{companion.layers} layers: 1 to {layers} are there"
                    raise ConfigError([Problem(f"companion {name}", reason)])
                self.lanes[key] = Lane(self.tree, cache, companion.layers)
            lanes[name] = self.lanes[key]
        return lanes

    def _companion_cache(self, model: str | None) -> Cache:
        if model not in self._caches:
            assert model is not None  # the target's own cache is there from the start
            if self._models is None:
                raise ConfigError([Problem("companion", f"no model {model!r} is at hand")])
            runner, target = self._models(model), self.main.cache.runner
            if runner.vocab_size != target.vocab_size:
                reason = f"{model}: its vocabulary has {runner.vocab_size} tokens, the target's {target.vocab_size}"
                raise ConfigError([Problem("companion", reason)])
            self._caches[model] = self._cache(runner, self._slots)
        return self._caches[model]

    @staticmethod
    def _cache(runner: ModelRunner, slots: int) -> Cache:
        runner.allocate(slots)
        return Cache(runner, SlotPool(slots))

    def _free(self, node: int) -> None:
        self.main.free(node)
        for lane in self.lanes.values():
            lane.free(node)


def _ask(plugin: Plugin, method: str, *arguments: Any) -> Any:
    """Call a plugin's method. What goes wrong in it is a `PluginError` that names both."""
    try:
        answer = getattr(plugin, method)(*arguments)
        return list(answer) if method == "rank" else answer
    except Exception as error:
        raise PluginError(plugin.name, method, f"{type(error).__name__}: {error}") from error
