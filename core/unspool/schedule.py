"""Who runs in a step: admission, the token budget, preemption, refusal with numbers.

Requests that only need their next token go first; prompts (and the recomputing of preempted requests) fill what is left
of the budget, the oldest first. A prompt that goes on like one which is being run waits for that, and takes it over.
When slots run short the youngest request loses its own and waits to be recomputed.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unspool.errors import AdmissionError
from unspool.lane import Cache, Lane, Share, Track
from unspool.live import Live
from unspool.prefixes import Prefix, in_common
from unspool.request import PreparedRequest
from unspool.tree import NONE, Tree

NO_PROMPT = range(0)
WORTH_A_STEP = 16
"""Tokens that a request waits for while another runs them. Fewer are run twice: a step that is missed costs more."""


@dataclass(eq=False)
class Plan:
    """What runs in this step: requests with rows, pieces of prompts that give none, and what is left for drafts."""

    ready: list[Live] = field(default_factory=list)
    pieces: list[tuple[Lane, Share]] = field(default_factory=list)
    tokens: int = 0
    prompts: int = 0
    """How many of the tokens are recomputed, or of a prompt."""
    draft_budget: int = 0
    """Drafts that may be added below each row."""


class Scheduler:
    """Decides who runs.

    Args:
        tree: the nodes.
        main: the target's lane.
        lanes_of: gives the companions' lanes of a request: name -> lane, and whether it runs beside every row.
        token_budget: most tokens of a pass.
        max_running: most requests that are admitted at once.
    """

    def __init__(
        self,
        tree: Tree,
        main: Lane,
        lanes_of: Callable[[PreparedRequest], Mapping[str, Lane]],
        token_budget: int,
        max_running: int,
    ) -> None:
        self._tree, self._main, self._lanes_of = tree, main, lanes_of
        self.token_budget, self.max_running = token_budget, max_running
        self.waiting: deque[Live] = deque()
        self.running: list[Live] = []
        self._preempted: set[Live] = set()
        self._waits: set[Live] = set()
        """Requests that wait in this step for what another runs of their prompts."""
        self._waited: set[Live] = set()
        """Those that did in the step before."""

    def refuse(self, request: PreparedRequest, prompts: Mapping[Lane, int]) -> AdmissionError | None:
        """Say why a request can never run here, with the numbers, or None. `prompts`: prompt length in each lane."""
        window = self._main.cache.runner.window
        new, prompt = request.limits.max_new_tokens, len(request.prompt_ids)
        if window is not None and prompt + new > window:
            return AdmissionError(
                "max_new_tokens", new, f"prompt of {prompt} tokens + {new} new tokens > the model's window of {window}"
            )
        starts = request.pipeline.strategy.start(request)
        needs: dict[Cache, int] = {}
        for lane, length in prompts.items():
            needs[lane.cache] = needs.get(lane.cache, 0) + length + max(1, starts) * (new - 1)
        for cache, need in needs.items():
            if need > cache.pool.size:
                return AdmissionError(
                    "max_new_tokens",
                    new,
                    f"the request needs {need} cache slots (prompt of {prompt}, {starts} x {new} new tokens) and the "
                    f"pool has {cache.pool.size}: ask for less, or give the engine more slots",
                )
        return None

    def plan(self) -> Plan:
        """Admit, preempt and choose. Everything that is chosen has its slots free."""
        self._preempted.clear()
        self._waited, self._waits = self._waits, set()
        self._admit()
        plan, left = Plan(), _Left(self.token_budget)
        if self._all_fit(plan, left):
            return plan
        lives = sorted(self.running, key=lambda live: (self._needs_prompt(live), live.order))
        for live in lives:
            if live in self._preempted:
                continue
            self._choose(live, plan, left)
        plan.ready.sort(key=lambda live: live.order)
        self._give_to_drafts(plan, left)
        return plan

    def _all_fit(self, plan: Plan, left: _Left) -> bool:
        """Choose everybody at once, where everybody needs no more than a next token and there is room for all."""
        nodes = 0
        for live in self.running:
            track, branches = live.tracks[self._main], live.branches
            if len(branches) != 1 or branches[0].held or len(live.tracks) > 1 or track.done < len(track.prompt):
                return False
            nodes += 1
        if not nodes <= min(left.tokens, self._main.cache.free):
            return False
        plan.ready, plan.tokens = list(self.running), nodes
        left.tokens -= nodes
        left.promised[self._main.cache] = nodes
        self._give_to_drafts(plan, left)
        return True

    def _choose(self, live: Live, plan: Plan, left: _Left) -> None:
        if all(track.done == len(track.prompt) for track in live.tracks.values()):
            self._choose_share(live, plan, left)
            return
        if left.tokens or not self._needs_prompt(live):  # else it is not chosen, and holds nothing that it need not
            for lane in live.tracks:
                lane.borrow(live)
        if self._is_being_run(live, left):
            self._waits.add(live)
            return
        self._choose_share(live, plan, left)
        if live in left.chosen:
            self._note_prompts(live, left)
            if not live.counts.preemptions:
                live.counts.cached_tokens = live.tracks[self._main].borrowed

    def _is_being_run(self, live: Live, left: _Left) -> bool:
        """Tell whether what comes next in a request's prompt is run in this step for another, and worth waiting for."""
        least = 1 if live in self._waited else WORTH_A_STEP  # to the end, however little is left of it
        for lane in self._pass_lanes(live) if left.prompts else ():
            track = live.tracks[lane]
            rest = track.prompt[track.done : -1]
            for other in left.prompts.get((lane, track.prefix), ()):
                if in_common(rest, other.prompt[track.done : -1]) >= least:
                    return True
        return False

    def _note_prompts(self, live: Live, left: _Left) -> None:
        for lane in self._pass_lanes(live):
            track = live.tracks[lane]
            if lane.prefixes is not None and track.done < len(track.prompt) - 1:
                left.prompts.setdefault((lane, track.prefix), []).append(track)

    def _choose_share(self, live: Live, plan: Plan, left: _Left) -> None:
        shares, asked = self.shares(live, live.held_drafts)
        before = sum(len(share.prompt) + len(share.ancestors) for _, share in shares)
        whole = sum(share.tokens for _, share in shares)
        if whole <= left.tokens or (before == 0 and plan.tokens == 0):
            if self._make_room(live, left, [(lane, share.new_slots(lane)) for lane, share in [*shares, *asked]]):
                plan.ready.append(live)
                plan.tokens += whole
                plan.prompts += before
                left.tokens = max(0, left.tokens - whole)
            return
        for lane, share in shares:
            piece = share.first(min(left.tokens, len(share.prompt) + len(share.ancestors)))
            if not piece.tokens:
                continue
            if not self._make_room(live, left, [(lane, piece.tokens)]):
                return
            plan.pieces.append((lane, piece))
            plan.tokens += piece.tokens
            plan.prompts += piece.tokens
            left.tokens -= piece.tokens
            if piece.tokens < len(share.prompt) + len(share.ancestors):
                return

    def shares(self, live: Live, drafts: Sequence[int]) -> tuple[list[tuple[Lane, Share]], list[tuple[Lane, Share]]]:
        """Say what a request has to run with `drafts` in the lanes of the pass, and without in those that are asked."""
        shares = [(lane, self.share(live, lane, drafts)) for lane in self._pass_lanes(live)]
        lanes = self._lanes_of(live.request).values()
        return shares, [(lane, self.share(live, lane)) for lane in lanes if lane not in dict(shares)]

    def share(self, live: Live, lane: Lane, drafts: Sequence[int] = ()) -> Share:
        """Say what a request has to run in a lane so that its branches become rows, and `drafts` are read with them."""
        track = live.tracks[lane]
        if len(live.branches) == 1 and track.done == len(track.prompt):
            branch = live.branches[0]
            parent = self._tree.parent[branch.node]
            if parent == NONE or parent in lane.slot:
                return Share(live, NO_PROMPT, (), [*([branch.node] if branch.held is None else ()), *drafts])
        nodes = list(dict.fromkeys([*(branch.node for branch in live.branches if branch.held is None), *drafts]))
        standing = list(dict.fromkeys(branch.node for branch in live.branches))
        share = lane.missing(live, standing)
        if share.prompt and live.root in nodes:
            nodes.remove(live.root)  # the prompt's own last token
        return Share(live, share.prompt, share.ancestors, nodes)

    def _pass_lanes(self, live: Live) -> list[Lane]:
        companions = live.request.pipeline.companions
        lanes = self._lanes_of(live.request)
        return [self._main, *(lanes[name] for name, c in companions.items() if c.every_row)]

    def _needs_prompt(self, live: Live) -> bool:
        track = live.tracks[self._main]
        return track.done < len(track.prompt)

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _make_room(self, live: Live, left: _Left, slots: list[tuple[Lane, int]]) -> bool:
        """Promise slots to a request, preempting the youngest as long as that helps. False: there is no room for it."""
        needs: dict[Cache, int] = {}
        for lane, count in slots:
            needs[lane.cache] = needs.get(lane.cache, 0) + count
        for cache, need in needs.items():
            while cache.free - left.promised.get(cache, 0) < need:
                if len(self.running) == 1:
                    raise Short(live, need, cache)
                others = [other for other in self.running if other not in left.chosen and other is not live]
                youngest = max(others, key=lambda other: other.order, default=live)
                if youngest is live or (youngest.order < live.order and live not in left.chosen):
                    if live not in left.chosen:
                        self.preempt(live)
                    return False
                self.preempt(youngest)
        for cache, need in needs.items():
            left.promised[cache] = left.promised.get(cache, 0) + need
        left.chosen.add(live)
        return True

    def _give_to_drafts(self, plan: Plan, left: _Left) -> None:
        drafting = [live for live in plan.ready if live.request.pipeline.drafts]
        rows = sum(len(live.branches) for live in drafting)
        if not rows:
            return
        room = left.tokens
        caches: dict[Cache, int] = {}
        for live in drafting:
            lanes = [self._main, *self._lanes_of(live.request).values()]
            for lane in lanes:
                caches[lane.cache] = max(caches.get(lane.cache, 0), sum(other.cache is lane.cache for other in lanes))
        for cache, lanes_there in caches.items():
            room = min(room, (cache.free - left.promised.get(cache, 0)) // lanes_there)
        plan.draft_budget = max(0, room // rows)

    def preempt(self, live: Live) -> None:
        """Take a request's slots away; it waits at the front to be recomputed. What it holds is forgotten."""
        for branch in live.branches:
            if branch.held is not None:
                for node in reversed(list(branch.held.drafts)):
                    self._tree.release(node)
                branch.held = None
        nodes = set()
        for branch in live.branches:
            node = branch.node
            while node != NONE and node not in nodes:
                nodes.add(node)
                node = self._tree.parent[node]
        for lane in list(live.tracks):
            lane.leave(live, nodes)
        live.counts.preemptions += 1
        self.running.remove(live)
        self._preempted.add(live)
        at = sum(other.order < live.order for other in self.waiting)
        self.waiting.insert(at, live)

    def _admit(self) -> None:
        """Admit the oldest waiting requests while their prompts fit beside what the running ones still need."""
        promised: dict[Cache, int] = {}
        for live in self.running if self.waiting else ():
            for lane, track in live.tracks.items():
                promised[lane.cache] = promised.get(lane.cache, 0) + len(track.prompt) - track.done + len(live.branches)
        while self.waiting and len(self.running) < self.max_running:
            live = self.waiting[0]
            needs: dict[Cache, int] = {}
            lanes = self.prompts(live.request)
            kept = len({node for branch in live.branches for node in self._ancestry(branch.node)})
            for lane, prompt in lanes.items():
                needs[lane.cache] = needs.get(lane.cache, 0) + lane.new_to_others(prompt) + kept + len(live.branches)
            if self.running and any(c.free - promised.get(c, 0) < need for c, need in needs.items()):
                return
            self.waiting.popleft()
            for lane, prompt in lanes.items():
                lane.enter(live, prompt)
            for cache, need in needs.items():
                promised[cache] = promised.get(cache, 0) + need
            bisect.insort(self.running, live, key=lambda other: other.order)

    def _ancestry(self, node: int) -> Iterable[int]:
        while self._tree.parent[node] != NONE:
            yield node
            node = self._tree.parent[node]

    def prompts(self, request: PreparedRequest) -> dict[Lane, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Give a request's prompt in each of its lanes."""
        own = np.array(request.prompt_ids, dtype=np.int64)
        found = {self._main: own}
        for name, lane in self._lanes_of(request).items():
            prompt = request.pipeline.companion_prompt(name, request)
            found[lane] = own if prompt is None else np.array(prompt, dtype=np.int64)
        return found


class Short(Exception):
    """One request alone needs more slots than the pool has: its strategy grows more branches than fit."""

    def __init__(self, live: Live, need: int, cache: Cache) -> None:
        self.live = live
        free, size = cache.free, cache.pool.size
        self.error = AdmissionError(
            "strategy",
            live.request.pipeline.strategy.name,
            f"its branches need {need} more cache slots, and {free} of {size} are free: fewer branches or more slots",
        )
        super().__init__(str(self.error))


@dataclass(eq=False)
class _Left:
    """What is left of the step while it is planned."""

    tokens: int
    promised: dict[Cache, int] = field(default_factory=dict)
    chosen: set[Live] = field(default_factory=set)
    prompts: dict[tuple[Lane, Prefix | None], list[Track]] = field(default_factory=dict)
    """Prompts that are run in this step, by where they go on."""
