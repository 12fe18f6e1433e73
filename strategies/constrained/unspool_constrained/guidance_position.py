"""Positions on llguidance: a matcher each, a cheap copy of the one before it.

A matcher is asked before it is given a token, because one that is given a wrong token is broken for good. It is never
given an end: the end of a text is ours.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from llguidance import LLMatcher

from unspool.masks import Octets
from unspool_constrained.engine import GrammarError

MOST_FORCED = 4096
"""Bytes of forced text beyond which it is not spelled out: a grammar without an end forces text for ever."""
REMEMBERED = 32
"""Tokens behind a position within which matchers and masks are kept."""


class GuidancePosition:
    """Where a text stands: a matcher that nobody moves any more.

    A matcher remembers its whole text, so only the last ones of a path are kept. One that is missed after all is made
    again from the tokens.

    Args:
        grammar: the language.
        matcher: has consumed the text.
        before: the position one token earlier, and that token; None: there is no text yet.
    """

    __slots__ = (
        "_before",
        "_depth",
        "_filling",
        "_found",
        "_grammar",
        "_matcher",
        "_refused",
        "_spare",
        "_trail",
        "has_stopped",
        "may_stop",
    )

    def __init__(
        self, grammar: GuidanceGrammar, matcher: LLMatcher, before: tuple[GuidancePosition, int] | None = None
    ) -> None:
        self._grammar, self._before = grammar, before
        self._matcher: LLMatcher | None = matcher
        self._found: tuple[Octets, int] | None = None
        """The masks that were found together, `[positions, octets]`, and which of them is this position's."""
        self._filling: Future[None] | None = None
        self._spare: list[LLMatcher] = []
        """A copy of the matcher for the first who goes on, made while nobody waited for it."""
        self._refused = ""
        self._depth: int = 0 if before is None else before[0]._depth + 1
        self._trail: int = id(grammar) if before is None else hash((before[0]._trail, before[1]))
        self.may_stop: bool = matcher.is_accepting()
        self.has_stopped: bool = matcher.is_stopped()

    def advance(self, token: int) -> GuidancePosition | None:
        """Give the position one token later, or None if that token cannot follow."""
        self._settle()
        masks, row = self._found or (self._grammar.spelled, 0)
        if self.has_stopped or not 0 <= token < 8 * masks.shape[1]:
            return None
        if not masks.item(row, token >> 3) >> (token & 7) & 1:
            return None
        if self._found is None and self.matcher.validate_tokens([token]) != 1:
            return None
        after = self._copy()
        if not after.consume_token(token):
            raise GrammarError(first_line(after.get_error()))
        position = GuidancePosition(self._grammar, after, (self, token))
        if position._depth % REMEMBERED == 0:
            position._forget()
        return position

    def closes_after(self, tokens: Sequence[int], *, with_end: bool) -> int | None:
        """Say how many of these tokens bring the text to where it may end, or must without end tokens; else None."""
        self._settle()
        if self.has_stopped or (with_end and self.may_stop):
            return 0
        if not with_end:
            return self._stops_after(tokens)
        # To be asked about tokens takes a matcher a tenth of what consuming them does.
        end, valid = self._grammar.end, self.matcher.validate_tokens
        taken = valid([*tokens, end])
        if taken > len(tokens):
            return len(tokens)
        return next((some for some in range(1, taken + 1) if valid([*tokens[:some], end]) > some), None)

    def _stops_after(self, tokens: Sequence[int]) -> int | None:
        matcher = self.matcher.deep_copy()  # which may break: nobody else has it
        for taken, token in enumerate(tokens):
            if not matcher.consume_token(token):
                return None
            if matcher.is_stopped():
                return taken + 1
        return None

    def forced(self, most: int) -> list[int]:
        """List the tokens that the language leaves no choice about, canonically tokenized, at most so many."""
        self._settle()
        if self.has_stopped or most < 1:
            return []
        matcher = self.matcher.deep_copy()  # asking moves it, and may break it
        if not 0 < len(matcher.compute_ff_bytes()) <= MOST_FORCED:
            return []
        tokens = matcher.compute_ff_tokens()[:most]
        return tokens[: self.matcher.validate_tokens(tokens)]

    @property
    def matcher(self) -> LLMatcher:
        """Give the matcher that has consumed the text. Nobody may move it."""
        if self._matcher is None:
            self._matcher = self._grammar.start().matcher
            if not self._matcher.consume_tokens(self._tokens()):
                raise GrammarError(first_line(self._matcher.get_error()))
        return self._matcher

    def _copy(self) -> LLMatcher:
        """Give a copy of the matcher, which may be moved."""
        try:
            return self._spare.pop()
        except IndexError:
            return self.matcher.deep_copy()

    def _tokens(self) -> list[int]:
        tokens, position = [], self
        while position._before is not None:
            position, token = position._before
            tokens.append(token)
        return tokens[::-1]

    def _forget(self) -> None:
        """Drop matchers and masks of ancestors that are far away, up to those that were dropped before."""
        position = self
        while position._before is not None and (self._depth - position._depth <= REMEMBERED or position._matcher):
            if self._depth - position._depth > REMEMBERED and position._filling is None:
                position._matcher, position._found, position._spare = None, None, []
            position = position._before[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuidancePosition) and self._trail == other._trail

    def __hash__(self) -> int:
        return self._trail

    def __deepcopy__(self, memo: object) -> GuidancePosition:
        return self

    def _settle(self) -> None:
        """Wait for a thread that is asking the matcher: it answers one at a time."""
        if self._filling is not None:
            self._filling.result()
            self._filling = None


class GuidanceGrammar:
    """A compiled language.

    Args:
        matcher: before any text.
        spelled: a bit for each token that has a text: `[1, octets]`.
        end: the token that stands for the end of a text; no matcher is ever given it.
    """

    def __init__(self, matcher: LLMatcher, spelled: Octets, end: int) -> None:
        self._matcher, self.spelled, self.end = matcher, spelled, end
        self._lock = threading.Lock()

    def start(self) -> GuidancePosition:
        """Give the position before any text."""
        with self._lock:
            return GuidancePosition(self, self._matcher.deep_copy())


def first_line(error: str) -> str:
    """Give what an error says, without the grammar that it quotes."""
    lines = [line.strip() for line in error.split("\n   1 |", maxsplit=1)[0].splitlines()]
    text = " ".join(line for line in lines if line and set(line) != {"^"})
    return text if len(text) <= 300 else text[:297] + "..."
