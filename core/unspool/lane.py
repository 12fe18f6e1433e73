"""One way in which the token tree is run: by a runner, after a prompt, through so many layers.

The target's own lane is what everybody shares. A companion (another model, another prompt, the first layers) is a lane
more: the same nodes, with slots of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.chain import Chain
from unspool.live import Live
from unspool.prefixes import Kept, Prefix, Prefixes
from unspool.runner import Batch, ModelRunner, Output, Span
from unspool.slots import Claim, SlotPool
from unspool.tree import NONE, Tree

Context = slice | NDArray[np.int64]
"""Slots: consecutive ones, or a list."""


class NoSlots(RuntimeError):
    """A pass needs more slots of a cache than are free."""

    def __init__(self, cache: Cache, need: int) -> None:
        self.cache, self.need = cache, need
        super().__init__(f"{need} cache slots are needed and {cache.free} are free")


class Trail(NamedTuple):
    """The slots of a path, in its order.

    Args:
        chain: of slots, shared with the paths along it.
        length: how many of them are this path's.
        first: the first of them, if they are consecutive; else -1.
    """

    chain: Chain
    length: int
    first: int

    @classmethod
    def of(cls, slots: NDArray[np.int64]) -> Trail:
        """Begin with the slots of a whole path."""
        first, length = int(slots[0]), len(slots)
        straight = int(slots[-1]) - first == length - 1 and bool((np.diff(slots) == 1).all())
        return cls(Chain(slots, length), length, first if straight else -1)

    def and_then(self, slot: int) -> Trail:
        """Give the trail one token later."""
        chain, at, first = self
        return Trail(chain.extended(at, slot), at + 1, first if slot == first + at else -1)

    @property
    def slots(self) -> NDArray[np.int64]:
        """Give the slots (a view: do not write to it)."""
        return self.chain.array[: self.length]

    @property
    def context(self) -> Context:
        """Give the slots as attention reads them."""
        return self.slots if self.first < 0 else slice(self.first, self.first + self.length)


@dataclass(eq=False)
class Cache:
    """A runner with its pool of slots, and hidden states stored a slot for those layers that somebody wants."""

    runner: ModelRunner
    pool: SlotPool
    hidden: dict[int, Tensor] = field(default_factory=dict)
    prefixes: list[Prefixes] = field(default_factory=list)
    """The trees of its lanes."""

    def __post_init__(self) -> None:
        self.kept = Kept(self.pool)

    @property
    def free(self) -> int:
        """Count the slots that may be taken: those that are free, and those of prompts that nobody counts on."""
        return self.pool.free + self.kept.idle

    def make_room(self, slots: int) -> None:
        """See to it that so many slots are free, as far as prompts can be given up for it."""
        if slots > self.pool.free:
            self.kept.give_up(slots - self.pool.free)

    def want(self, layers: Iterable[int]) -> None:
        """Store the hidden states of these layers beside keys and values from now on."""
        for layer in layers:
            if layer not in self.hidden:
                for prefixes in self.prefixes:  # they were run without it
                    prefixes.drop()
                shape = self.pool.size, self.runner.width
                self.hidden[layer] = torch.zeros(shape, dtype=self.runner.dtype, device=self.runner.device)


@dataclass(eq=False)
class Track:
    """Where a request stands in a lane: its prompt there, and how much of it has run."""

    prompt: NDArray[np.int64]
    claim: Claim
    slots: NDArray[np.int64]
    prefix: Prefix | None = None
    """The piece of the tree of prompts with which its first `shared` slots end."""
    shared: int = 0
    """How many of its slots are the tree's. All but the last token's are, once they have run."""
    borrowed: int = 0
    """How many of them it did not run."""
    done: int = 0


class Share(NamedTuple):
    """What one request runs in a pass of one lane: a piece of its prompt, then nodes, parents first.

    `ancestors` only have to be there; `nodes` are read. A node may be both: one branch stands where another passed.
    """

    live: Live
    prompt: range
    ancestors: Sequence[int]
    nodes: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Count the tokens that it runs."""
        return len(self.prompt) + len(self.nodes) + len(self.silent)

    @property
    def silent(self) -> frozenset[int]:
        """Give the ancestors that are not read."""
        return frozenset(self.ancestors).difference(self.nodes) if self.ancestors else frozenset()

    def first(self, count: int) -> Share:
        """Give the part of it that `count` tokens can carry, without readings."""
        prompt = self.prompt[:count]
        return Share(self.live, prompt, self.ancestors[: count - len(prompt)])

    def new_slots(self, lane: Lane) -> int:
        """Count the slots that it will take."""
        if len(self.nodes) == 1 and not self.ancestors and not self.prompt:  # most requests, most of the time
            return int(self.nodes[0] not in lane.slot)
        return len(self.prompt) + len(self.silent) + sum(node not in lane.slot for node in self.nodes)


class Readings:
    """What a pass said of the nodes that it ran."""

    def __init__(self, output: Output, row: dict[int, int], packed: dict[int, int]) -> None:
        self.logits, self.hidden = output.logits, output.hidden
        self.row, self.packed = row, packed

    def __contains__(self, node: object) -> bool:
        return node in self.row


class Lane:
    """One way in which the tree is run.

    Args:
        tree: the nodes.
        cache: the runner and its slots; lanes of one model share it.
        layers: run the first so many layers only.
        keeps: keep prompts that have run, for others that begin alike.
    """

    def __init__(self, tree: Tree, cache: Cache, layers: int | None = None, *, keeps: bool = True) -> None:
        self.tree, self.cache, self.layers = tree, cache, layers
        self.prefixes = Prefixes(cache.kept) if keeps else None
        if self.prefixes is not None:
            cache.prefixes.append(self.prefixes)
        self.slot: dict[int, int] = {}
        self._trails: dict[int, Trail] = {}
        """Of nodes that have something running below them, or soon will."""
        self._owner: dict[int, Claim] = {}

    def enter(self, live: Live, prompt: NDArray[np.int64]) -> None:
        """Begin a request here (again, after a preemption)."""
        length, pool = len(prompt) + live.request.limits.max_new_tokens * live.widest, self.cache.pool
        slots = np.empty(len(prompt), dtype=np.int64)
        if self.prefixes is None:
            live.tracks[self] = Track(prompt, pool.claim(min(length, pool.size)), slots)
            return
        top = self.prefixes.top
        prefix, shared = self.prefixes.borrow(top, prompt[:-1], idle=False)
        all_of_it, known = self.prefixes.borrow(top, prompt[:-1])  # so that it is not given up for the claim
        length = min(length - len(known), pool.size)
        if self.cache.kept.idle:  # a path in one piece is worth more than an old prompt
            self.cache.kept.give_up(length - pool.unclaimed())
        claim, done = pool.claim(length), len(shared)
        self.prefixes.release(all_of_it)
        slots[:done] = shared
        live.tracks[self] = Track(prompt, claim, slots, prefix, done, done, done)

    def borrow(self, live: Live) -> None:
        """Count on what others have run of the rest of a request's prompt, but for its last token."""
        track = live.tracks[self]
        if self.prefixes is None or track.done >= len(track.prompt) - 1:
            return
        assert track.prefix is not None and track.shared == track.done
        track.prefix, slots = self.prefixes.borrow(track.prefix, track.prompt[track.done : -1])
        track.slots[track.done : track.done + len(slots)] = slots
        track.borrowed += len(slots)
        track.done = track.shared = track.done + len(slots)

    def new_to_others(self, prompt: NDArray[np.int64]) -> int:
        """Count the tokens of a prompt that no other request counts on: it needs slots for these."""
        return len(prompt) - (self.prefixes.in_use(prompt[:-1]) if self.prefixes is not None else 0)

    def leave(self, live: Live, nodes: Iterable[int]) -> None:
        """Free everything that a request has here: the slots of its prompt and of `nodes`."""
        track = live.tracks.pop(self, None)
        if track is None:
            return
        for node in nodes:
            self.free(node)
        self.slot.pop(live.root, None)
        self._trails.pop(live.root, None)
        if self.prefixes is not None:
            self._part(live, track)
        for slot in track.slots[track.shared : track.done].tolist():
            self.cache.pool.give(track.claim, slot)
        self.cache.pool.unclaim(track.claim)

    def _part(self, live: Live, track: Track) -> None:
        """Count no longer on the prompt of a request that leaves, and leave behind what is known to be sound."""
        assert self.prefixes is not None and track.prefix is not None
        counts, failed = live.counts, live.result is not None and live.result.error is not None
        if counts.first_token is not None and not (failed and counts.preemptions):  # else it was read before it was run
            if track.done == len(track.prompt):
                self._give(track, track.done)
            self.prefixes.prove(track.prefix)
        elif failed:
            self.prefixes.doubt(track.prefix)
        self.prefixes.release(track.prefix)

    def _give(self, track: Track, stop: int) -> bool:
        """Give what has run of a prompt to the tree. True: it was there, and its own slots for it are free."""
        assert self.prefixes is not None and track.prefix is not None
        ran = track.slots[track.shared : stop].copy()
        track.prefix, kept = self.prefixes.give(track.prefix, track.prompt[track.shared : stop], ran)
        track.slots[track.shared : stop] = kept
        track.shared = stop
        twice = ran[ran != kept].tolist()
        for slot in twice:
            self.cache.pool.give(track.claim, slot)
        return bool(twice)

    def free(self, node: int) -> None:
        """Free the slot of a node, if it has one here."""
        claim = self._owner.pop(node, None)
        if claim is not None:
            self.cache.pool.give(claim, self.slot.pop(node))
            trail = self._trails.pop(node, None)
            if trail is not None:
                trail.chain.shortened(trail.length - 1)

    def missing(self, live: Live, nodes: Sequence[int]) -> Share:
        """Say what must have run before `nodes` can: the rest of the prompt, and ancestors without a slot."""
        track = live.tracks[self]
        ancestors: dict[int, None] = {}
        for node in nodes:
            chain = []
            parent = self.tree.parent[node]
            while parent != NONE and parent not in self.slot and parent not in ancestors:
                if self.tree.parent[parent] != NONE:  # the root is the prompt's last token
                    chain.append(parent)
                parent = self.tree.parent[parent]
            ancestors.update(dict.fromkeys(reversed(chain)))
        return Share(live, range(track.done, len(track.prompt)), list(ancestors))

    def run(self, shares: Sequence[Share]) -> Readings:
        """Run a packed pass of this lane alone; see `run_together`."""
        return run_together({self: shares})[self]

    def keep(self, share: Share) -> None:
        """Give a piece of a prompt that has just run to the tree, but for the last token, which may be run again."""
        track = share.live.tracks[self]
        stop = min(track.done, len(track.prompt) - 1)
        if stop > track.shared and self._give(track, stop):  # the slots of the path are others now
            for node in (share.live.root, *share.nodes, *share.silent):
                self.forget_trail(node)

    def undo(self, shares: Sequence[Share], fresh: Sequence[int]) -> None:
        """Free what a pass that failed was to fill."""
        for node in fresh:
            self.free(node)
        for live, piece in ((share.live, share.prompt) for share in shares if share.prompt):
            track = live.tracks[self]
            if track.done == len(track.prompt):
                del self.slot[live.root]
                self._trails.pop(live.root, None)
            track.done = piece.start
            for slot in track.slots[piece.start : piece.stop].tolist():
                self.cache.pool.give(track.claim, slot)

    def place(self, live: Live, claim: Claim, node: int) -> int:
        """Put a node that is about to run into a slot. The scheduler has kept one free."""
        slot = self.slot[node] = self.cache.pool.take_one(claim)
        self._owner[node] = claim
        parent = self.tree.parent[node]
        self._trails[node] = (self._trails.get(parent) or self.trail(live, parent)).and_then(slot)
        return slot

    def trail(self, live: Live, node: int) -> Trail:
        """Give the slots of a path, the prompt's first."""
        below: list[int] = []
        at = node
        while (known := self._trails.get(at)) is None and at != live.root:
            below.append(self.slot[at])
            at = self.tree.parent[at]
        if known is None:
            known = self._trails[at] = Trail.of(live.tracks[self].slots)
        for slot in reversed(below):
            known = known.and_then(slot)
        self._trails[node] = known
        return known

    def forget_trail(self, node: int) -> None:
        """Drop the trail of a node that is only an ancestor now (it is found again where it is needed)."""
        self._trails.pop(node, None)


def run_together(shares: Mapping[Lane, Sequence[Share]], hidden: Sequence[int] = ()) -> dict[Lane, Readings]:
    """Run one packed pass of lanes that share a cache and run the same layers.

    Args:
        shares: what runs in each lane.
        hidden: the layers whose hidden states are wanted.

    Returns:
        For each lane the logits of all `nodes` in it, and of each root whose prompt the pass completes.

    Raises:
        NoSlots: there are not slots enough. Then, and if the model raises, nothing has changed.
    """
    (cache,), (layers,) = {lane.cache for lane in shares}, {lane.layers for lane in shares}
    need = sum(share.new_slots(lane) for lane, own in shares.items() for share in own)
    if need > cache.free:
        raise NoSlots(cache, need)
    cache.make_room(need)
    stored = cache.hidden if layers is None else {}  # it is the target's own, which runs all layers
    packed = _Packed()
    packings = [_Packing(lane, packed) for lane in shares]
    for packing in packings:
        for share in shares[packing.lane]:
            packing.add(share)
    try:
        output = cache.runner.forward(packed.batch(tuple(dict.fromkeys([*hidden, *stored])), layers))
    except Exception:  # what holds nothing must not pass for run
        for packing in packings:
            packing.lane.undo(shares[packing.lane], packing.fresh)
        raise
    for layer, store in stored.items():
        store[torch.from_numpy(packed.slot_array).to(store.device)] = output.hidden[layer]
    for packing in packings:
        for share in packing.prompts if packing.lane.prefixes is not None else ():
            packing.lane.keep(share)
    return {packing.lane: Readings(output, packing.row, packing.packed) for packing in packings}


@dataclass(eq=False)
class _Packed:
    """What a pass runs, one after another."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    @cached_property
    def slot_array(self) -> NDArray[np.int64]:
        """Give the slots, when all are there."""
        return np.array(self.slots, dtype=np.int64)

    def batch(self, hidden: Sequence[int], layers: int | None) -> Batch:
        """Give all of it as a runner takes it."""
        return Batch(
            token_ids=np.array(self.tokens, dtype=np.int64),
            positions=np.array(self.positions, dtype=np.int64),
            slots=self.slot_array,
            spans=self.spans,
            wanted=np.array(self.wanted, dtype=np.int64),
            hidden=hidden,
            layers=layers,
        )


class _Packing:
    """Packs the shares of requests in one lane.

    Args:
        lane: where they run.
        into: the pass, which may hold those of other lanes.
    """

    def __init__(self, lane: Lane, into: _Packed) -> None:
        self.lane, self.tree = lane, lane.tree
        self.tokens, self.positions, self.slot_list = into.tokens, into.positions, into.slots
        self.spans, self.wanted = into.spans, into.wanted
        self.row: dict[int, int] = {}
        self.packed: dict[int, int] = {}
        self.fresh: list[int] = []
        """Nodes that had no slot before."""
        self.prompts: list[Share] = []
        """Those of which a piece of the prompt runs."""

    def add(self, share: Share) -> None:
        lane, live, tree = self.lane, share.live, self.tree
        if share.prompt:
            self.prompts.append(share)
            self._prompt(live, share.prompt)
        nodes, silent = share.nodes, share.silent
        if silent or len(nodes) > 1:  # parents first
            nodes = sorted([*silent, *nodes], key=tree.length.__getitem__)
        if not nodes:
            return
        track, start, slots = live.tracks[lane], len(self.tokens), lane.slot
        base = len(track.prompt) - 1
        for at, node in enumerate(nodes, start):
            slot = slots.get(node)
            if slot is None:
                slot = lane.place(live, track.claim, node)
                self.fresh.append(node)
            self.packed[node] = at
            if node not in silent:
                self.row[node] = len(self.wanted)
                self.wanted.append(at)
            # In a companion's lane the root is the last token of the companion's own prompt.
            self.tokens.append(int(track.prompt[-1]) if node == live.root else tree.token[node])
            self.positions.append(base + tree.length[node])
            self.slot_list.append(slot)
        self.spans.append(self._span(live, start, nodes))
        for parent in {tree.parent[node] for node in nodes}.difference(nodes):
            lane.forget_trail(parent)

    def _prompt(self, live: Live, piece: range) -> None:
        lane, track, start = self.lane, live.tracks[self.lane], len(self.tokens)
        slots = lane.cache.pool.take(track.claim, len(piece))
        track.slots[piece.start : piece.stop] = slots
        track.done = piece.stop
        self.tokens += track.prompt[piece.start : piece.stop].tolist()
        self.positions += piece
        self.slot_list += slots.tolist()
        self.spans.append(Span(start, len(piece), Trail.of(track.slots[: piece.stop]).context))
        if track.done == len(track.prompt):
            root = live.root
            lane.slot[root] = self.slot_list[-1]
            lane.forget_trail(root)
            self.packed[root] = len(self.tokens) - 1
            self.row[root] = len(self.wanted)
            self.wanted.append(len(self.tokens) - 1)

    def _span(self, live: Live, start: int, nodes: Sequence[int]) -> Span:
        lane, parent = self.lane, self.tree.parent
        if len(nodes) == 1 or all(parent[node] == before for before, node in pairwise(nodes)):
            return Span(start, len(nodes), lane.trail(live, nodes[-1]).context)
        paths = [lane.trail(live, node).slots for node in nodes]
        first, end = int(min(path.min() for path in paths)), int(max(path.max() for path in paths)) + 1
        if end - first > 2 * sum(map(len, paths)):  # far apart: nothing that long is laid out
            return Span(start, len(nodes), *_union(paths))
        mask = np.zeros((len(nodes), end - first), dtype=np.bool_)
        for row, path in zip(mask, paths, strict=True):
            row[path - first] = True
        used = mask.any(axis=0)
        holes = np.flatnonzero(~used) + first
        if len(holes) <= used.sum() // 2 and lane.cache.pool.wrote(live.tracks[lane].claim, holes):
            return Span(start, len(nodes), slice(first, end), mask)
        return Span(start, len(nodes), np.flatnonzero(used) + first, mask[:, used])


def _union(paths: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give all slots of some paths, ascending, and for each path which of them it has."""
    context = np.unique(np.concatenate(paths))
    mask = np.zeros((len(paths), len(context)), dtype=np.bool_)
    for row, path in zip(mask, paths, strict=True):
        row[np.searchsorted(context, path)] = True
    return context, mask
