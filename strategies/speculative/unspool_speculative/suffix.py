"""Suffix decoding: guess that a text goes on as such texts most often did, here and in earlier answers.

Agents, code and forms repeat not only their prompt but one another. The longest ending of a row's path that was said
before is looked for in the path itself, and in a suffix automaton of all that this engine has finished. The likeliest
ways in which it went on are drafted, as a tree: a way that is certain is long, one of several is short.

    chance(draft)  =  chance(parent) * n / (n + 1) * count(phrase, token) / sum over tokens of count(phrase, token)
    draft          =  the `length` likeliest nodes,   n = tokens that match before them

Oliaro et al. 2024 (SuffixDecoding). Costs no pass and no model: a walk of a few dozen steps for each row. A path is not
put into an automaton of its own: that takes longer than a step does where the prompt is long, and each has to pay it.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_speculative.automaton import ROOT, Automaton
from unspool_speculative.echoes import Echoes
from unspool_speculative.hang import Guess, hang, sure

if TYPE_CHECKING:
    from unspool.request import PreparedRequest, Result
    from unspool.step import Step

LOOK_BACK = 64
"""Tokens of a path that are matched with what was said elsewhere."""
UNLIKELY = 0.5
"""Guesses are made down to this share of the least chance that is worth a row: they may be likelier than they seem."""


class Said(Protocol):
    """What was said, as states that tell what followed them."""

    def following(self, state: Any) -> Sequence[tuple[int, Any, int]]:
        """List what followed a state: (token, its state, how often)."""
        ...


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
    """What a request knows: the echoes in the path of each of its rows, and the engine's memory."""

    memory: Memory | None
    echoes: list[Echoes] = field(default_factory=list)


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
        """Begin with what the engine remembers."""
        return Own(request.shared.get(self.name) if self.params.remember else None)

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
        rows = zip(paths.numpy(force=True), lengths.tolist(), step.request.tolist(), strict=True)
        owns, place = step.own(self), defaultdict[int, Iterator[int]](itertools.count)
        found = [_find(owns[request], next(place[request]), path[:length]) for path, length, request in rows]
        takes = step.takes([sure(matched, 0) for matched, _, _ in found]) if adapt else [True] * count
        least = UNLIKELY * step.least_chance if adapt else 0.0
        guesses: list[list[Guess]] = []
        for (matched, said, state), taken, budget in zip(found, takes, step.budget.tolist(), strict=True):
            enough = taken and matched >= self.params.min_match
            guesses.append(likeliest(said, state, matched, min(self.params.length, budget), least) if enough else [])
        hang(step, guesses, adapt=adapt)


def _find(own: Own, place: int, path: NDArray[np.int64]) -> tuple[int, Said, Any]:
    """Find the longest ending of a request's path that was said before: its length, and where it is known.

    Args:
        own: the request's.
        place: the row's, among those of the request: it most likely goes on from the one that was there before.
        path: the row's.
    """
    if place == len(own.echoes):
        own.echoes.append(Echoes(LOOK_BACK))
    echoes = own.echoes[place]
    echoes.hear(path)
    matched = min(echoes.matched, LOOK_BACK)
    if own.memory is None or matched == LOOK_BACK:
        return matched, echoes, echoes.ends
    automaton = own.memory.automaton
    state, elsewhere = automaton.find(path[-LOOK_BACK:].tolist())
    while state != ROOT and not automaton.follows(state):
        state, elsewhere = automaton.shorter(state)  # a text's own end, after which nothing was said
    return (elsewhere, automaton, state) if elsewhere > matched else (matched, echoes, echoes.ends)


def likeliest(said: Said, state: Any, matched: int, most: int, least: float = 0.0) -> list[Guess]:
    """Grow the tree of what followed a state, the likeliest node first, and none that is less likely than `least`."""
    guesses: list[Guess] = []
    heap: list[tuple[float, int, int, int, float, Any, int]] = []
    order = 0

    def push(parent: int, state: Any, chance: float, depth: int) -> None:
        nonlocal order
        following = said.following(state)
        total = sum(count for _, _, count in following)
        for token, to, count in following:
            confidence = count / total * sure(matched, depth)
            if chance * confidence >= least:
                heapq.heappush(heap, (-chance * confidence, order, parent, token, confidence, to, depth))
                order += 1

    push(-1, state, 1.0, 0)
    while heap and len(guesses) < most:
        negative, _, parent, token, confidence, to, depth = heapq.heappop(heap)
        guesses.append(Guess(parent, token, confidence))
        push(len(guesses) - 1, to, -negative, depth + 1)
    return guesses
