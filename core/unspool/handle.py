"""A submitted request in the hands of the one who asked: wait for it, stream it, cancel it.

Nothing is queued for a reader: a stream keeps its place in the request's own tokens, which are bounded by
`max_new_tokens`, and takes all that has become final since it last looked. A slow reader costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unspool.live import Live
from unspool.plugin import Plugin
from unspool.request import Hypothesis, PreparedRequest, Result
from unspool.text import Detokenizer, StopStrings
from unspool.tree import Tree

if TYPE_CHECKING:
    from unspool.engine import Engine


@dataclass(frozen=True)
class Piece:
    """New tokens of one hypothesis that are final, and the text that they add (it may lag behind them).

    Args:
        text: the new text; never half a character, never a part of a stop string.
        token_ids: the new token ids.
        index: which of the request's independent streams it belongs to; 0 where there is one.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0


class Handle:
    """One submitted request."""

    def __init__(self, engine: Engine, request: PreparedRequest) -> None:
        self.request = request
        self.live: Live | None = None
        self.watched = False
        self.final: list[list[int]] = [[] for _ in range(request.n if request.pipeline.independent else 1)]
        """Tokens of each stream that are final. Only grows; written under the condition."""
        self.changed = threading.Condition()
        self._engine = engine
        self._result: Result | None = None
        self._listeners: list[Callable[[], None]] = []
        self._at_end: list[Callable[[], None]] = []

    @property
    def id(self) -> str:
        """Name the request."""
        return self.request.id

    @property
    def done(self) -> bool:
        """Tell whether the request has ended."""
        return self._result is not None

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result. A request that failed has its error in `result.error`.

        Raises:
            TimeoutError: it has not ended within `timeout` seconds; it goes on.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: self._result is not None, timeout):
                raise TimeoutError(f"request {self.id!r} has not ended within {timeout} s")
            assert self._result is not None
            return self._result

    def cancel(self) -> None:
        """End the request as it is. What it has so far becomes its result."""
        if not self.done:
            self._engine._cancel(self)

    def stream(self) -> Stream:
        """Stream the request's final tokens, from the beginning."""
        self.watched = True
        return Stream(self, self._engine.detokenizer)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called (from the engine's thread) whenever there is something new."""
        with self.changed:
            self._listeners.append(listener)
        listener()

    def on_end(self, listener: Callable[[], None]) -> None:
        """Have `listener` called once, when the request has ended (at once if it has)."""
        with self.changed:
            if self._result is None:
                self._at_end.append(listener)
                return
        listener()

    def advance(self, final: Sequence[Sequence[int]]) -> None:
        """Add tokens that have become final."""
        if any(final):
            with self.changed:
                for stream, tokens in zip(self.final, final, strict=False):
                    stream.extend(tokens)
                self._notify()

    def finish(self, result: Result) -> None:
        """Hand the result over."""
        with self.changed:
            self._result = result
            self._notify()
            waiting, self._at_end = self._at_end, []
        for listener in waiting:
            listener()

    def _notify(self) -> None:
        self.changed.notify_all()
        for listener in self._listeners:
            listener()


class Stream:
    """The pieces of a request as they become final. Iterate, then ask for `result()`.

    The concatenated text of index 0 is the text of the result's best hypothesis (with independent samples, the text of
    each index is that of the hypothesis of that stream). Leaving the iteration early cancels the request.
    """

    def __init__(self, handle: Handle, detokenizer: Detokenizer) -> None:
        self.handle = handle
        self._writers = [_Writer(handle.request, detokenizer) for _ in handle.final]

    def __iter__(self) -> Iterator[Piece]:
        try:
            done = False
            while not done:
                with self.handle.changed:
                    self.handle.changed.wait_for(lambda: self.handle.done or self._has_more())
                    done = self.handle.done
                yield from self.take()
        finally:  # left early, or interrupted while it waited
            self.handle.cancel()
        result = self.handle.result()
        if result.error is not None:
            raise result.error

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the whole result."""
        return self.handle.result(timeout)

    def take(self) -> list[Piece]:
        """Take what has become final since the last look, without waiting."""
        with self.handle.changed:
            result = self.handle._result
            fresh = [final[writer.taken :] for final, writer in zip(self.handle.final, self._writers, strict=True)]
        if result is None:
            pieces = [writer.write(tokens) for writer, tokens in zip(self._writers, fresh, strict=True)]
        elif result.error is None:
            pieces = [self._rest(index, writer, result) for index, writer in enumerate(self._writers)]
        else:
            return []
        return [Piece(text, tuple(tokens), index) for index, (text, tokens) in enumerate(pieces) if text or tokens]

    def _has_more(self) -> bool:
        return any(len(final) > w.taken for final, w in zip(self.handle.final, self._writers, strict=True))

    def _rest(self, index: int, writer: _Writer, result: Result) -> tuple[str, list[int]]:
        independent = self.handle.request.pipeline.independent
        own = [h for h in result.hypotheses if h.stream == index] if independent else result.hypotheses[:1]
        return writer.finish(own[0]) if own else ("", [])


class _Writer:
    """Turns the final tokens of one stream into text that can be shown."""

    def __init__(self, request: PreparedRequest, detokenizer: Detokenizer) -> None:
        self.taken = 0
        self._shown = 0
        self._text = ""
        self._detokenizer, self._state = detokenizer, detokenizer.start(request.prompt_ids)
        self._stops = StopStrings(request.limits.stop)
        self._stop_state = self._stops.start()
        self._cut: int | None = None
        """Where the text ends, once a stop string is complete."""

    def write(self, tokens: list[int]) -> tuple[str, list[int]]:
        self.taken += len(tokens)
        for token in tokens:
            self._state, piece = self._detokenizer.push(self._state, token)
            self._text += piece
            self._stop_state, cut = self._stops.push(self._stop_state, piece)
            self._cut = cut if self._cut is None else self._cut
        end = len(self._text) - self._stops.held(self._stop_state)
        return self._show(end if self._cut is None else self._cut), tokens

    def finish(self, hypothesis: Hypothesis) -> tuple[str, list[int]]:
        tokens = list(hypothesis.token_ids[self.taken :])
        self.taken = len(hypothesis.token_ids)
        self._text = hypothesis.text
        return self._show(len(self._text)), tokens

    def _show(self, end: int) -> str:
        text = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return text


def newly_final(tree: Tree, live: Live, known: Sequence[Sequence[int]]) -> list[list[int]]:
    """Give the tokens that have become final in each stream, beyond those that are known.

    A token is final when all branches and all hypotheses that may still be returned agree on it: those of the stream
    where branches cannot affect each other, elsewhere all of the request's.
    """
    request = live.request
    independent, prompt = request.pipeline.independent, len(request.prompt_ids)
    paths: list[list[Sequence[int]]] = [[] for _ in known]
    for node, stream in {(branch.node, branch.stream if independent else 0) for branch in live.branches}:
        if stream < len(known):
            paths[stream].append(tree.path(node)[prompt + len(known[stream]) :].tolist())
    for hypothesis in _returnable(live):
        stream = hypothesis.stream if independent else 0
        if stream < len(known):
            tokens = hypothesis.token_ids[:-1] if hypothesis.finish_reason == "eos" else hypothesis.token_ids
            paths[stream].append(tokens[len(known[stream]) :])
    return [_agreed(of_stream) for of_stream in paths]


def _agreed(paths: Sequence[Sequence[int]]) -> list[int]:
    """Give the longest beginning that all paths share."""
    agreed = 0
    for tokens in zip(*paths, strict=False):
        if len(set(tokens)) > 1:
            break
        agreed += 1
    return list(paths[0][:agreed]) if paths else []


def _returnable(live: Live) -> list[Hypothesis]:
    """List the hypotheses that may still be returned: ranked by score, only the best n can be."""
    strategy = live.request.pipeline.strategy
    if live.request.pipeline.independent:
        return live.hypotheses
    if type(strategy).rank is Plugin.rank and len(live.hypotheses) > live.request.n:
        return list(strategy.rank(live.request, live.hypotheses))[: live.request.n]
    return live.hypotheses
