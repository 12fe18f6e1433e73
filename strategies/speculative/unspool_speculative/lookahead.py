"""Lookahead decoding: let the pass that gives the next token try out phrases that may be needed later.

Below each row hangs a chain of guesses, and off each of them a phrase of `ngram` - 1 tokens that has grown from pass to
pass. The pass says how each of these goes on; whole phrases go into a pool with those of the text, and all lose their
first token and grow on. Where a row ends as phrases of the pool begin, what follows there is drafted.

    y[j]    =  what the pipeline chooses after  path, c[0][0], ..., c[0][j], c[1][j], ..., c[n - 2][j]
    pool   <-  c[0][j], ..., c[n - 2][j], y[j],  and each n tokens of the path                  (a phrase has n tokens)
    c'[l]   =  c[l + 1],   c'[n - 2]  =  y,  shifted as far as the text has come                (Jacobi iteration)
    drafts  =  what follows the path's last token in the pool, the latest first;  beside them the window c

After Fu et al. 2024: c[l][j] is what they call the token of step l at place j + l, and a tree of tokens has just the
paths on which it must be seen. The noise of a token depends on its place alone, so a sampled text is iterated as a
greedy one. Where a strategy does not choose row by row (beams), or at once, the pool has the text's phrases only.

Costs no pass and no model, but rows: at most (`window` + `guesses`) * (`ngram` - 1) below each branch. What is learnt
from the window helps later: with `adapt` it is run only where its rows are nearly free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_speculative.hang import Guess, hang

if TYPE_CHECKING:
    from unspool.hooks import Growth
    from unspool.request import PreparedRequest
    from unspool.step import Step

FIRSTS = 4096
"""First tokens that a pool knows phrases of, at most."""
NOTHING = -1
"""A place of the window that is to be filled."""
IN_CHAIN, IN_PHRASE = 0.1, 0.5
"""How sure a guess of the window is: c[0], and what has grown."""


class Pool:
    """Phrases by their first token, the latest of each.

    Args:
        ngram: tokens of a phrase.
        most: phrases that are kept of each first token.
    """

    def __init__(self, ngram: int, most: int) -> None:
        self.ngram, self.most = ngram, most
        self._phrases: dict[int, dict[tuple[int, ...], int]] = {}
        """First token -> the rest of each phrase -> how often it came; the latest last, in both."""

    def learn(self, tokens: Sequence[int], start: int = 0) -> None:
        """Take up the phrases that end at `start` or later."""
        for end in range(max(start + 1, self.ngram), len(tokens) + 1):
            first, *rest = tokens[end - self.ngram : end]
            phrases = self._phrases.pop(first, {})
            self._phrases[first] = phrases
            phrases[tuple(rest)] = phrases.pop(tuple(rest), 0) + 1
            if len(phrases) > self.most:
                del phrases[next(iter(phrases))]
            if len(self._phrases) > FIRSTS:
                del self._phrases[next(iter(self._phrases))]

    def after(self, first: int) -> list[tuple[tuple[int, ...], int]]:
        """List what followed a token, and how often, the latest first."""
        return list(reversed(self._phrases.get(first, {}).items()))


@dataclass(eq=False)
class Stream:
    """What is guessed of one stream.

    Args:
        read: tokens of its path whose phrases are in the pool.
        start: tokens of its path when the window was hung.
        window: c, by level; the columns stand side by side in the text.
        said: column -> what the pipeline chose there, y.
    """

    read: int
    start: int = 0
    window: list[list[int]] = field(default_factory=list)
    said: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class Own:
    """What a request knows: its phrases, its streams, and where they end in this step."""

    pool: Pool
    streams: dict[int, Stream] = field(default_factory=dict)
    places: dict[tuple[int, int], int] = field(default_factory=dict)
    """(stream, node) -> the column whose phrase ends there."""


class Lookahead(Plugin):
    """Try out phrases beside the text, and draft those that begin as it ends."""

    row_local = True

    class Params(Parameters):
        """How many phrases are tried and remembered."""

        window: int = Field(
            8, ge=0, le=128, description="Phrases that are tried at a time; 0: those of the text alone."
        )
        ngram: int = Field(4, ge=2, le=32, description="Tokens of a phrase, the first included.")
        guesses: int = Field(8, ge=1, le=64, description="Phrases that are kept, and drafted, of each first token.")
        adapt: bool = Field(True, description="Run only those drafts that are worth their rows; `false`: all.")

    def open(self, request: PreparedRequest) -> Own:
        """Read the prompt."""
        own = Own(Pool(self.params.ngram, self.params.guesses))
        own.pool.learn(request.prompt_ids)
        return own

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Hang phrases of the pool, and the window beside them."""
        params = self.params
        paths, lengths = step.paths()
        request, number, owns = step.request.tolist(), step.stream.tolist(), step.own(self)
        guesses, ends = [], []
        for row, (padded, length) in enumerate(zip(paths.tolist(), lengths.tolist(), strict=True)):
            own, path = owns[request[row]], padded[:length]
            stream = own.streams.setdefault(number[row], Stream(len(step.requests[request[row]].prompt_ids)))
            move(stream, own.pool, path, params.window if step.proposes else 0)
            known = tree(own.pool.after(path[-1]))
            tried, last = laid_out(stream.window, len(known))
            guesses.append(known + tried)
            ends.append(last)
        for own in owns:
            own.places = {}
        for row, nodes in enumerate(hang(step, guesses, adapt=params.adapt)):
            places = {(number[row], nodes[end]): column for column, end in enumerate(ends[row]) if end in nodes}
            owns[request[row]].places.update(places)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Note how the pipeline goes on after each phrase. Nothing is stopped.

        Where all rounds are held at once, each guess that was run is a row. Those that will turn out not to exist are
        what is wanted here: what is noted of them, however often, is of use to guesses alone.
        """
        owns, request = step.own(self), step.request.tolist()
        number, node = step.stream.tolist(), step.node.tolist()
        for row, token in zip(growth.row.tolist(), growth.token.tolist(), strict=True):
            own = owns[request[row]]
            column = own.places.get((number[row], node[row]))
            if column is not None:
                own.streams[number[row]].said[column] = token


def move(stream: Stream, pool: Pool, path: list[int], columns: int) -> None:
    """Take up what the last pass said, let the window grow by it, and fill it up where the path is now."""
    levels = stream.window or [[] for _ in range(pool.ngram - 1)]
    if stream.said:
        for column, token in stream.said.items():
            pool.learn([*(level[column] for level in levels), token])
        levels = [*levels[1:], [stream.said.get(column, NOTHING) for column in range(len(levels[0]))]]
        levels = [level[max(0, len(path) - stream.start - 1) :] for level in levels]
    pool.learn(path[max(0, stream.read - pool.ngram + 1) :], min(stream.read, pool.ngram - 1))
    filled: list[list[int]] = []
    for depth, level in enumerate(levels):
        padded = [*level, *[NOTHING] * columns][:columns]
        for column in (place for place, token in enumerate(padded) if token == NOTHING):
            phrases = pool.after(filled[-1][column]) if depth else []
            padded[column] = phrases[0][0][0] if phrases else path[7 * (len(path) + column + depth) % len(path)]
        filled.append(padded)
    stream.read = stream.start = len(path)
    stream.window, stream.said = filled, {}


def laid_out(window: Sequence[Sequence[int]], first: int) -> tuple[list[Guess], list[int]]:
    """Lay a window out as a tree: the chain of its first level, and off each token of it the rest of its column.

    Args:
        window: by level.
        first: number of the first guess.

    Returns:
        The guesses, column by column, and the number of each column's last one.
    """
    guesses: list[Guess] = []
    ends: list[int] = []
    above = -1
    for column in zip(*window, strict=True):
        parent = above
        above = first + len(guesses)
        for depth, token in enumerate(column):
            guesses.append(Guess(parent, token, IN_PHRASE if depth else IN_CHAIN))
            parent = first + len(guesses) - 1
        ends.append(parent)
    return guesses, ends


def tree(phrases: Sequence[tuple[tuple[int, ...], int]]) -> list[Guess]:
    """Merge what follows a token into a tree: a guess is as sure as it came often, among those beside it.

    Args:
        phrases: the rest of each, and how often it came.

    Returns:
        The guesses of the first phrase, then those that others have besides.
    """
    numbers: dict[tuple[int, int], int] = {}
    counts: list[int] = []
    total: dict[int, int] = {}
    depths: list[int] = []
    for rest, count in phrases:
        parent = -1
        for depth, token in enumerate(rest):
            total[parent] = total.get(parent, 0) + count
            number = numbers.setdefault((parent, token), len(counts))
            if number == len(counts):
                counts.append(0)
                depths.append(depth)
            counts[number] += count
            parent = number
    return [
        Guess(parent, token, counts[number] / total[parent] * (1 - 1 / (1 + counts[number] + depths[number])))
        for (parent, token), number in numbers.items()
    ]
