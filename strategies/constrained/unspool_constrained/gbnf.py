"""GBNF and EBNF, the notations of llama.cpp and transformers-CFG, read into nodes.

A rule is `name ::= alternatives`; it goes on over lines until another one begins. Literals, classes, `.`, brackets and
the repetitions `*`, `+`, `?`, `{m,n}` are known, and the escapes `\\n`, `\\r`, `\\t`, `\\x41`, `\\u0041`, `\\U1F600`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from unspool_constrained.engine import GrammarError

_SPACE = re.compile(r"(?:[ \t]|#[^\n]*)*")
_SPACES = re.compile(r"(?:\s|#[^\n]*)*")
_NAME = re.compile(r"[\w-]+")
_RULE = re.compile(r"(?:\s|#[^\n]*)*[\w-]+[ \t]*::=")
_REPEAT = re.compile(r"[*+?]|\{\s*(\d+)\s*(,\s*(\d*)\s*)?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{1,8})|(.))", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t"}
_DEEPEST = 100


@dataclass(frozen=True)
class Literal:
    """These characters, one after the other."""

    text: str


@dataclass(frozen=True)
class Class:
    """One character, of a class in the notation of regular expressions."""

    regex: str


@dataclass(frozen=True)
class Reference:
    """What another rule says."""

    name: str


@dataclass(frozen=True)
class Parts:
    """All parts, one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of the parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part, `least` to `most` times; None: any number."""

    part: Node
    least: int
    most: int | None


Node = Literal | Class | Reference | Parts | Choice | Repeat


class Reader:
    """Reads a grammar.

    Args:
        text: the grammar.
    """

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def rules(self) -> dict[str, Node]:
        """Give the rules that `root` needs, by name."""
        rules: dict[str, Node] = {}
        self._skip(_SPACES)
        while self._at < len(self._text):
            name = self._take(_NAME, "the name of a rule")
            self._skip(_SPACE)
            self._expect("::=")
            self._skip(_SPACES)
            rules[name] = self._choice(nested=False)
            self._skip(_SPACES)
        if "root" not in rules:
            raise GrammarError("a grammar with a rule `root`")
        return _needed(rules)

    def _choice(self, *, nested: bool) -> Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise GrammarError(f"a grammar with brackets at most {_DEEPEST} deep")
        parts = [self._sequence(nested)]
        while self._another(nested):
            parts.append(self._sequence(nested))
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _another(self, nested: bool) -> bool:
        """Tell whether an alternative follows, perhaps on a line of its own, and go there."""
        before = self._at
        self._skip(_SPACES)
        if self._text.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACES if nested else _SPACE)
            return True
        self._at = self._at if nested else before
        return False

    def _sequence(self, nested: bool) -> Node:
        parts: list[Node] = []
        while True:
            before = self._at
            self._skip(_SPACES)
            # A rule goes on in the next line, as long as that does not begin another one.
            if not nested and "\n" in self._text[before : self._at] and _RULE.match(self._text, self._at):
                self._at = before
                break
            part = self._part()
            if part is None:
                break
            parts.append(self._repeated(part))
        return parts[0] if len(parts) == 1 else Parts(tuple(parts))

    def _part(self) -> Node | None:
        character = self._text[self._at : self._at + 1]
        if character in ("", "|", ")"):
            return None
        if character == '"' or character == "'":
            return self._literal(character)
        if character == "[":
            return self._class()
        if character == "(":
            self._at += 1
            inner = self._choice(nested=True)
            self._skip(_SPACES)
            self._expect(")")
            return inner
        if character == ".":
            self._at += 1
            return Class("(?s:.)")
        return Reference(self._take(_NAME, "a literal, a class, a rule or a bracket"))

    def _repeated(self, part: Node) -> Node:
        self._skip(_SPACE)
        while found := _REPEAT.match(self._text, self._at):
            self._at = found.end()
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (int(found[1] or 0), None))
            if found[1]:
                most = least if not found[2] else int(found[3]) if found[3] else None
            part = Repeat(part, least, most)
            self._skip(_SPACE)
        return part

    def _literal(self, quote: str) -> Literal:
        self._at += 1
        text = ""
        while not self._text.startswith(quote, self._at):
            text += self._character()
        self._at += 1
        return Literal(text)

    def _class(self) -> Class:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        items = ""
        while not self._text.startswith("]", self._at):
            first = self._character()
            items += escaped(first)
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                last = self._character()
                if last < first:
                    raise self._wrong(f"a range that ascends, not {first}-{last}")
                items += f"-{escaped(last)}"
        self._at += 1
        if not items:
            raise self._wrong("a class with a character in it")
        return Class(f"[{'^' * negated}{items}]")

    def _character(self) -> str:
        if self._at >= len(self._text):
            raise self._wrong("the end of a literal or class")
        if not self._text.startswith("\\", self._at):
            self._at += 1
            return self._text[self._at - 1]
        found = _ESCAPE.match(self._text, self._at)
        if found is None:
            raise self._wrong("a character that is escaped")
        self._at = found.end()
        code = found[1] or found[2] or found[3]
        if code is None:
            return _PLAIN.get(found[4], found[4])
        if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) <= 0xDFFF:
            raise self._wrong("a code of Unicode")
        return chr(int(code, 16))

    def _skip(self, space: re.Pattern[str]) -> None:
        found = space.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _take(self, pattern: re.Pattern[str], wanted: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._wrong(wanted)
        self._at = found.end()
        return found[0]

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            raise self._wrong(f"`{text}`")
        self._at += len(text)

    def _wrong(self, wanted: str) -> GrammarError:
        line = self._text.count("\n", 0, self._at) + 1
        return GrammarError(f"{wanted} in line {line}, where {self._text[self._at : self._at + 20]!r} stands")


def _needed(rules: Mapping[str, Node]) -> dict[str, Node]:
    """Leave the rules that `root` needs."""
    needed, waiting = {"root"}, ["root"]
    while waiting:
        for name in _references(rules[waiting.pop()]):
            if name not in rules:
                raise GrammarError(f"a grammar that has all its rules: there is no {name!r}")
            if name not in needed:
                needed.add(name)
                waiting.append(name)
    return {name: node for name, node in rules.items() if name in needed}


def without_dead_ends(rules: Mapping[str, Node]) -> dict[str, Node]:
    """Leave out what no text can come to the end of, as `x ::= "a" x`: nothing may begin with it.

    Raises:
        GrammarError: nothing is left.
    """
    ends: set[str] = set()
    while more := {name for name, node in rules.items() if name not in ends and _can_end(node, ends)}:
        ends |= more
    if "root" not in ends:
        raise GrammarError("a grammar with at least one text that comes to an end")
    return _needed({name: _alive(node, ends) for name, node in rules.items() if name in ends})


def _can_end(node: Node, ends: Set[str]) -> bool:
    match node:
        case Reference(name):
            return name in ends
        case Parts(parts):
            return all(_can_end(part, ends) for part in parts)
        case Choice(parts):
            return any(_can_end(part, ends) for part in parts)
        case Repeat(part, least, _):
            return least == 0 or _can_end(part, ends)
        case Literal() | Class():
            return True


def _alive(node: Node, ends: Set[str]) -> Node:
    """Give a node that can end without what in it cannot."""
    match node:
        case Parts(parts):
            return Parts(tuple(_alive(part, ends) for part in parts))
        case Choice(parts):
            return Choice(tuple(_alive(part, ends) for part in parts if _can_end(part, ends)))
        case Repeat(part, least, most):
            return Repeat(_alive(part, ends), least, most) if _can_end(part, ends) else Literal("")
    return node


def _references(node: Node) -> Iterator[str]:
    match node:
        case Reference(name):
            yield name
        case Parts(parts) | Choice(parts):
            for part in parts:
                yield from _references(part)
        case Repeat(part):
            yield from _references(part)


def escaped(character: str) -> str:
    """Write a character so that it stands for itself in a regular expression."""
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"
