"""What a text can be held to: a JSON schema, a regular expression, one of several strings, a grammar, tagged calls.

These are plain values, so they are the key under which a compiled grammar is kept, and say nothing of the engine that
compiles them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    """JSON that a schema takes. `compact`: without whitespace between its parts."""

    text: str
    compact: bool = False


@dataclass(frozen=True)
class Pattern:
    """Texts that a regular expression matches from beginning to end."""

    regex: str


@dataclass(frozen=True)
class Strings:
    """One of these strings."""

    strings: tuple[str, ...]


@dataclass(frozen=True)
class Lark:
    """Texts of a context-free grammar in Lark's notation, whose first rule is `start`."""

    text: str


@dataclass(frozen=True)
class Tag:
    """A piece of text between two markers, and the language of what stands between them."""

    begin: str
    inner: Schema | Pattern | Lark
    end: str


@dataclass(frozen=True)
class TaggedText:
    """Free text in which every begin marker is followed by its language and its end marker.

    `required`: at least one is there.
    """

    tags: tuple[Tag, ...]
    required: bool = False


Language = Schema | Pattern | Strings | Lark | TaggedText
