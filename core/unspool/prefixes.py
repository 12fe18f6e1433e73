"""What is kept of prompts that have run: a radix tree over their tokens, so that nobody runs the same beginning twice.

Each lane has a tree of its own. The slots in it are the tree's; requests count on them for as long as they live. What
nobody counts on stays until its room is needed, and then the least recently used goes first, from its end.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from unspool.slots import SlotPool

Ids = NDArray[np.int64]

NOTHING: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PrefixStats:
    """How far prompts were served from what was kept of others.

    Args:
        prompt_tokens: of the requests that have ended.
        cached_tokens: those of them that were not run, because others had.
        kept: tokens that are kept now.
        evicted: tokens that were given up for want of room.
    """

    prompt_tokens: int
    cached_tokens: int
    kept: int
    evicted: int

    @property
    def hit_rate(self) -> float:
        """Give the part of all prompt tokens that was served from cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)


class Prefix:
    """A piece of prompts, after the piece above it: its tokens, and the slots that hold them."""

    __slots__ = ("above", "below", "gone", "proven", "slots", "tokens", "used", "users")

    def __init__(self, above: Prefix | None, tokens: Ids, slots: Ids, users: int = 1) -> None:
        self.above, self.tokens, self.slots, self.users = above, tokens, slots, users
        self.below: dict[int, Prefix] = {}
        """By first token."""
        self.used = 0
        """When somebody counted on it last."""
        self.proven = above is None
        """A request has read healthy logits after it."""
        self.gone: bool = above is not None and above.gone
        """No newcomer finds it any more: it is freed when its last request leaves."""


class Kept:
    """What all trees over one pool hold, in the order in which it is given up.

    Args:
        pool: of the slots.
    """

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self.held = 0
        """Slots that are the trees'."""
        self.idle = 0
        """Those of them that nobody counts on."""
        self.evicted = 0
        """Slots that were given up for want of room."""
        self._clock, self._tie = count(1), count()
        self._leaves: list[tuple[int, int, Prefix]] = []
        """A heap, oldest first; entries that no longer hold are skipped when they come up."""
        self._most = 1024

    def now(self) -> int:
        """Give the time, which is later at each call."""
        return next(self._clock)

    def give_up(self, slots: int) -> None:
        """Free that many slots, or all that are idle."""
        while slots > 0 and self._leaves:
            leaf = self._leaves[0][2]
            if not self._holds(self._leaves[0]):
                heapq.heappop(self._leaves)
                continue
            cut = len(leaf.slots) - min(slots, len(leaf.slots))
            slots -= len(leaf.slots) - cut
            self.evicted += len(leaf.slots) - cut
            self.idle -= len(leaf.slots) - cut
            self.free(leaf, cut)

    def free(self, prefix: Prefix, start: int = 0) -> None:
        """Free the slots of a leaf from `start` on; a leaf of which nothing is left leaves the tree."""
        self.held -= len(prefix.slots) - start
        self.pool.give_all(prefix.slots[start:])
        above = prefix.above
        assert above is not None and not prefix.below, "only leaves are freed"
        if not start:
            if above.below.get(int(prefix.tokens[0])) is prefix:
                del above.below[int(prefix.tokens[0])]
            self.offer(above)
        prefix.tokens, prefix.slots = prefix.tokens[:start], prefix.slots[:start]

    def offer(self, prefix: Prefix) -> None:
        """Let a piece be given up in its turn, if it is an idle leaf."""
        if prefix.users or prefix.below or prefix.gone or prefix.above is None:
            return
        heapq.heappush(self._leaves, (prefix.used, next(self._tie), prefix))
        if len(self._leaves) > self._most:
            self._leaves = [entry for entry in self._leaves if self._holds(entry)]
            heapq.heapify(self._leaves)
            self._most = 2 * len(self._leaves) + 1024

    @staticmethod
    def _holds(entry: tuple[int, int, Prefix]) -> bool:
        used, _, leaf = entry
        return not leaf.users and not leaf.below and leaf.used == used and len(leaf.slots) > 0


class Prefixes:
    """The tree of one lane. `top` is the empty prefix, of which all others are continuations.

    Args:
        kept: what all trees over the same pool hold.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.top = Prefix(None, NOTHING, NOTHING)

    def borrow(self, prefix: Prefix, tokens: Ids, *, idle: bool = True) -> tuple[Prefix, Ids]:
        """Count on what is known of the tokens that come after `prefix`.

        Args:
            prefix: which the caller counts on.
            tokens: that may follow it.
            idle: count on what nobody counts on yet too.

        Returns:
            The last piece, which the caller is to release instead of `prefix`, and the slots of the known tokens.
        """
        found = [NOTHING]
        now = self.kept.now()
        while len(tokens):
            below = prefix.below.get(int(tokens[0]))
            if below is None or not (idle or below.users):
                break
            same = in_common(below.tokens, tokens)
            prefix = below if same == len(below.tokens) else self._split(below, same)
            if not prefix.users:
                self.kept.idle -= same
            prefix.users += 1
            prefix.used = now
            found.append(prefix.slots)
            tokens = tokens[same:]
        return prefix, np.concatenate(found)

    def in_use(self, tokens: Ids) -> int:
        """Count the first tokens that are known and that somebody counts on."""
        prefix, length = self.top, 0
        while len(tokens):
            below = prefix.below.get(int(tokens[0]))
            if below is None or not below.users:
                break
            same = in_common(below.tokens, tokens)
            length += same
            if same < len(below.tokens):
                break
            prefix, tokens = below, tokens[same:]
        return length

    def give(self, prefix: Prefix, tokens: Ids, slots: Ids) -> tuple[Prefix, Ids]:
        """Hand over tokens that have run after `prefix`, and count on them.

        Returns:
            The last piece, which the caller is to release instead of `prefix`, and the slots that hold the tokens now:
            of those that were known already the tree keeps its own, and the caller's are left to the caller.
        """
        prefix, known = self.borrow(prefix, tokens)
        if len(known) < len(tokens):
            prefix = Prefix(prefix, tokens[len(known) :].copy(), slots[len(known) :].copy())
            assert prefix.above is not None
            prefix.above.below[int(prefix.tokens[0])] = prefix
            prefix.used = self.kept.now()
            self.kept.held += len(prefix.slots)
        return prefix, np.concatenate([known, slots[len(known) :]])

    def release(self, prefix: Prefix) -> None:
        """Count on a prefix no longer."""
        now = self.kept.now()
        at = prefix
        while (above := at.above) is not None:
            at.users -= 1
            at.used = now
            if not at.users and at.gone:
                self.kept.free(at)
            elif not at.users:
                self.kept.idle += len(at.slots)
                self.kept.offer(at)
            at = above

    def prove(self, prefix: Prefix) -> None:
        """Note that healthy logits were read after a prefix."""
        while not prefix.proven:
            prefix.proven = True
            assert prefix.above is not None
            prefix = prefix.above

    def doubt(self, prefix: Prefix) -> None:
        """Let nobody find what is not proven of a prefix: its slots may hold NaN."""
        unproven = None
        while not prefix.proven:
            assert prefix.above is not None
            unproven, prefix = prefix, prefix.above
        if unproven is not None and not unproven.gone:
            self._detach(unproven)

    def drop(self) -> None:
        """Let nobody find anything of what is here, and free what nobody counts on."""
        for prefix in list(self.top.below.values()):
            self._detach(prefix)
        self.top.gone = True  # what running requests have yet to give continues this one
        self.top = Prefix(None, NOTHING, NOTHING)

    def _detach(self, prefix: Prefix) -> None:
        above = prefix.above
        assert above is not None
        del above.below[int(prefix.tokens[0])]
        pieces = [prefix]
        for piece in pieces:
            pieces += piece.below.values()
        for piece in reversed(pieces):  # leaves first
            if piece.users:
                piece.gone = True
            else:
                self.kept.idle -= len(piece.slots)
                self.kept.free(piece)
        self.kept.offer(above)

    def _split(self, prefix: Prefix, at: int) -> Prefix:
        """Make the first tokens of a piece a piece of its own. What is left of `prefix` ends where it ended."""
        above = prefix.above
        assert above is not None
        first = Prefix(above, prefix.tokens[:at], prefix.slots[:at], prefix.users)
        first.used, first.proven, first.gone = prefix.used, prefix.proven, prefix.gone
        above.below[int(first.tokens[0])] = first
        prefix.above, prefix.tokens, prefix.slots = first, prefix.tokens[at:], prefix.slots[at:]
        first.below[int(prefix.tokens[0])] = prefix
        return first


def in_common(one: Ids, other: Ids) -> int:
    """Count the tokens with which both begin."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
