"""Phrases that a text must contain, and how much of them a path has said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrase:
    """Tokens in a row, to be found wherever they stand (Knuth, Morris & Pratt 1977).

    Args:
        tokens: at least one.
        back: after so many tokens and a wrong one, how many of them may still be the beginning.
    """

    tokens: tuple[int, ...]
    back: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Phrase:
        """Prepare a phrase."""
        back = [0]
        for at in range(1, len(tokens)):
            said = back[at - 1]
            while said and tokens[said] != tokens[at]:
                said = back[said - 1]
            back.append(said + 1 if tokens[said] == tokens[at] else 0)
        return cls(tuple(tokens), tuple(back))

    def after(self, said: int, token: int) -> int:
        """Say how much of it stands at the end of a path one token later."""
        while said and self.tokens[said] != token:
            said = self.back[said - 1]
        return said + 1 if self.tokens[said] == token else 0


@dataclass(frozen=True)
class Progress:
    """How much of each wish a path has said.

    Args:
        wishes: each a set of alternatives, one of which must be said.
        said: for each wish how much of each alternative stands at the path's end; None: one was said.
    """

    wishes: tuple[tuple[Phrase, ...], ...]
    said: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def start(cls, wishes: Sequence[Sequence[Phrase]]) -> Progress:
        """Begin with nothing said."""
        return cls(tuple(map(tuple, wishes)), tuple((0,) * len(wish) for wish in wishes))

    def after(self, token: int) -> Progress:
        """Give the progress one token later."""
        said: list[tuple[int, ...] | None] = []
        for wish, before in zip(self.wishes, self.said, strict=True):
            now = before and tuple(phrase.after(count, token) for phrase, count in zip(wish, before, strict=True))
            met = now and any(count == len(phrase.tokens) for phrase, count in zip(wish, now, strict=True))
            said.append(None if met else now)
        return Progress(self.wishes, tuple(said))

    @property
    def met(self) -> bool:
        """Tell whether every wish was said."""
        return all(said is None for said in self.said)

    @property
    def bank(self) -> int:
        """Count the tokens that are met: of wishes that were said their longest alternatives, of others the most begun.

        Of several that begin alike only one counts: to go on with it always leads to a higher bank.
        """
        pairs = list(zip(self.wishes, self.said, strict=True))
        begun = max((max(said) for said in self.said if said is not None), default=0)
        return begun + sum(longest(wish) for wish, said in pairs if said is None)

    @property
    def banks(self) -> int:
        """Count the banks that there are, from nothing met to everything."""
        return 1 + sum(map(longest, self.wishes))

    def next_tokens(self) -> set[int]:
        """List the tokens that would bring an unmet wish on."""
        return {
            phrase.tokens[count]
            for wish, said in zip(self.wishes, self.said, strict=True)
            if said is not None
            for phrase, count in zip(wish, said, strict=True)
        }


def longest(wish: Sequence[Phrase]) -> int:
    """Count the tokens of the longest alternative."""
    return max(len(phrase.tokens) for phrase in wish)


def fewest(wishes: Sequence[Sequence[Phrase]]) -> int:
    """Count tokens without which no text has said all wishes: their lengths, less what each may share with another.

    It is what a text needs where no two wishes overlap. Where they do it may be too small, and never too large.
    """
    lengths, fresh = [], []
    for number, wish in enumerate(wishes):
        others = [phrase.tokens for other, rest in enumerate(wishes) if other != number for phrase in rest]
        shared = [max((overlap(other, phrase.tokens) for other in others), default=0) for phrase in wish]
        lengths.append(min(len(phrase.tokens) for phrase in wish))
        fresh.append(min(len(phrase.tokens) - count for phrase, count in zip(wish, shared, strict=True)))
    return sum(fresh) + min(length - count for length, count in zip(lengths, fresh, strict=True))


def overlap(before: tuple[int, ...], phrase: tuple[int, ...]) -> int:
    """Count how many first tokens of a phrase may stand already where another one ends."""
    counts = (len(phrase) - cut for cut in range(len(phrase)))
    return next((c for c in counts if before[-c:] == phrase[:c] or phrase[:c][-len(before) :] == before), 0)
