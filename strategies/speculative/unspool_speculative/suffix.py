"""Suffix decoding: guess that a text goes on as such texts most often did, here and in earlier answers.

Agents, code and forms repeat not only their prompt but one another. What was said is kept in two suffix automata: one
of the request's own path, and one of all that this engine has finished. The longest ending of a row's path that either
has seen is looked up, and the likeliest ways in which it went on are drafted, as a tree: a way that is certain is long,
one of several is short.

    chance(draft)  =  chance(parent) * n / (n + 1) * count(phrase, token) / sum over tokens of count(phrase, token)
    draft          =  the `length` likeliest nodes,   n = tokens that match before them

Oliaro et al. 2024 (SuffixDecoding). Costs no pass and no model: a walk of a few dozen steps for each row.
"""

from __future__ import annotations

import heapq
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_speculative.automaton import ROOT, Automaton
from unspool_speculative.hang import Guess, hang, sure

if TYPE_CHECKING:
    from unspool.request import PreparedRequest, Result
    from unspool.step import Step

LOOK_BACK = 64
"""Tokens of a path that are matched with what was said elsewhere."""


class Memory:
    """The finished texts of an engine, the latest of them.

    Args:
        most: tokens that are kept; beyond, the older half is forgotten.
    """

    def __init__(self, most: int) -> None:
        self.most, self.automaton = most, Automaton()
        self._texts: list[tuple[int, ...]] = []
        self._lock = threading.Lock()

    def learn(self, tokens: tuple[int, ...]) -> None:
        """Remember a text."""
        with self._lock:
            self._texts.append(tokens[-self.most :])
            if self.automaton.tokens + len(self._texts[-1]) <= self.most:
                self.automaton.feed(self._texts[-1])
                return
            kept: list[tuple[int, ...]] = []
            room = self.most // 2
            for text in reversed(self._texts):
                room -= len(text)
                if room < 0 and kept:
                    break
                kept.append(text)
            self._texts, fresh = kept[::-1], Automaton()
            for text in self._texts:
                fresh.feed(text)
            self.automaton = fresh


@dataclass(eq=False)
class Own:
    """What a request knows: its own path as far as it was read, and the engine's memory."""

    memory: Memory | None
    automaton: Automaton = field(default_factory=Automaton)
    read: list[int] = field(default_factory=list)
    last: int = ROOT


class Suffix(Plugin):
    """Draft the likeliest ways in which what was just said went on before."""

    row_local = True

    class Params(Parameters):
        """How much is guessed, and how much is remembered."""

        main: ClassVar[str | None] = "length"
        length: int = Field(16, ge=1, le=512, description="Most drafts below a row, in all its ways.")
        min_match: int = Field(2, ge=1, le=64, description="Shortest ending that says anything.")
        remember: int = Field(
            100_000, ge=0, le=10_000_000, description="Tokens of finished texts that an engine keeps; 0: none."
        )
        adapt: bool = Field(True, description="Run only those drafts that are worth their rows; `false`: all.")

    def share(self) -> Memory:
        """Begin with no finished text."""
        return Memory(self.params.remember)

    def open(self, request: PreparedRequest) -> Own:
        """Read the prompt."""
        own = Own(request.shared.get(self.name) if self.params.remember else None)
        _read(own, list(request.prompt_ids))
        return own

    def close(self, own: Own, result: Result) -> None:
        """Remember what came of it."""
        if own.memory is not None and result.error is None:
            for hypothesis in result.hypotheses:
                own.memory.learn((*result.prompt_token_ids[-LOOK_BACK:], *hypothesis.token_ids))

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Look up every row's path."""
        adapt, count = self.params.adapt, len(step.node)
        if adapt and not any(step.takes([1.0] * count)):
            return
        paths, lengths = step.paths()
        request, owns = step.request.tolist(), step.own(self)
        found, seen = [], set()
        for row, (padded, length) in enumerate(zip(paths.numpy(force=True), lengths.tolist(), strict=True)):
            own, path = owns[request[row]], padded[:length]
            if request[row] not in seen:
                seen.add(request[row])
                _read(own, path.tolist())
            found.append(_find(own, path))
        takes = step.takes([sure(matched, 0) for matched, _, _ in found]) if adapt else [True] * count
        guesses: list[list[Guess]] = []
        for (matched, automaton, state), taken, budget in zip(found, takes, step.budget.tolist(), strict=True):
            said = taken and matched >= self.params.min_match
            guesses.append(likeliest(automaton, state, matched, min(self.params.length, budget)) if said else [])
        hang(step, guesses, adapt=adapt)


def _find(own: Own, path: NDArray[np.int64]) -> tuple[int, Automaton, int]:
    """Find the longest ending of a path after which something was said: its length, and where it is known."""
    end = path[-LOOK_BACK:].tolist()
    found = []
    for automaton in (own.automaton, *([own.memory.automaton] if own.memory else [])):
        its_own = automaton is own.automaton and len(own.read) == len(path) and own.read[-LOOK_BACK:] == end
        state, matched = automaton.shorter(own.last) if its_own else automaton.find(end)
        while state != ROOT and not automaton.follows(state):
            state, matched = automaton.shorter(state)  # a text's own end, after which nothing was said
        found.append((min(matched, LOOK_BACK), automaton, state))
    return max(found, key=lambda one: one[0])


def likeliest(automaton: Automaton, state: int, matched: int, most: int) -> list[Guess]:
    """Grow the tree of what followed a state, the likeliest node first."""
    guesses: list[Guess] = []
    heap: list[tuple[float, int, int, int, float, int, int]] = []
    order = 0

    def push(parent: int, state: int, chance: float, depth: int) -> None:
        nonlocal order
        following = automaton.following(state)
        total = sum(count for _, _, count in following)
        for token, to, count in following:
            confidence = count / total * sure(matched, depth)
            heapq.heappush(heap, (-chance * confidence, order, parent, token, confidence, to, depth))
            order += 1

    push(-1, state, 1.0, 0)
    while heap and len(guesses) < most:
        negative, _, parent, token, confidence, to, depth = heapq.heappop(heap)
        guesses.append(Guess(parent, token, confidence))
        push(len(guesses) - 1, to, -negative, depth + 1)
    return guesses


def _read(own: Own, path: list[int]) -> None:
    """Feed a request's automaton what its path has got since. A path that turned elsewhere is read on as a new text."""
    read = own.read
    if path[: len(read)] == read:
        own.last = own.automaton.feed(path[len(read) :], own.last)
    else:
        common = next((i for i, (a, b) in enumerate(zip(path, read, strict=False)) if a != b), len(path))
        own.last = own.automaton.feed(path[max(0, common - LOOK_BACK) :])
    own.read = path
