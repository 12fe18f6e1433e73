"""What `grammar` claims to allow: the texts that derive from its rules, which are tried at every place of a text.

    ends(node, at)  =  where a text of the node that begins at `at` may end;  beyond,  if it needs more than there is

A text is whole if `root`, from its beginning, ends at its end. It begins a longer one if that ends beyond. Rules that
refer to each other are gone through until nothing is new, so a rule may begin with itself.

GBNF speaks of characters, and so does Lark where each of its terminals is one. What other Lark means depends on how its
terminals are cut, which has no second form as short as this: claims leave it open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from unspool_constrained.claims import allowed, text_of
from unspool_constrained.gbnf import Choice, Class, Literal, Node, Parts, Reader, Reference, Repeat

Rules = tuple[tuple[str, Node], ...]
"""A grammar: rules by name. A text is what `root` says."""

_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_LARK_RULE = re.compile(r"\s*([a-z_][a-z0-9_]*)\s*:(.*)", re.DOTALL)
_LARK_PART = re.compile(r'\s+|[a-z_][a-z0-9_]*|[|()*+?]|"[^"\\]"|/(?:\[\^?[A-Za-z0-9]+\]|\\\W|[A-Za-z0-9])/')


class Grammar:
    """What derives from the rules."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Derive the whole, or a longer text that begins so."""
        rules, text = rules_of_grammar(params.grammar), text_of(request, tokens, ended)
        return text is not None and allowed(params, standing(rules, text).takes(ended), ended)

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """End where no text is longer."""
        rules, text = rules_of_grammar(params.grammar), text_of(request, tokens, False)
        return None if text is None else standing(rules, text).finishes()


@dataclass(frozen=True)
class Standing:
    """Where a text stands in a language: whether it is one of its texts, and whether a longer one begins so."""

    whole: bool
    more: bool

    def takes(self, ended: bool) -> bool:
        """Tell whether the language takes the text, as a whole or as a beginning."""
        return self.whole or (self.more and not ended)

    def finishes(self) -> str | None:
        """Say how the text ends by itself, if it does."""
        return "grammar_end" if self.whole and not self.more else None


@lru_cache(maxsize=64)
def rules_of_grammar(text: str) -> Rules:
    """Read a grammar.

    Raises:
        NotImplementedError: it is Lark with longer terminals.
    """
    return tuple(Reader(text if _GBNF.search(text) else _gbnf_of(text)).rules().items())


def _gbnf_of(lark: str) -> str:
    """Write Lark as GBNF, part by part, where each terminal is a character."""
    lines = []
    for line in filter(str.strip, lark.splitlines()):
        rule = _LARK_RULE.fullmatch(line)
        parts = _LARK_PART.findall(rule[2]) if rule else []
        if rule is None or "".join(parts) != rule[2]:
            raise NotImplementedError(f"Lark whose terminals are more than a character: {line.strip()}")
        lines.append(f"{_name(rule[1])} ::= {' '.join(map(_part, parts))}")
    return "\n".join(lines)


def _name(rule: str) -> str:
    return {"start": "root", "root": "start"}.get(rule, rule).replace("_", "-")


def _part(part: str) -> str:
    if part.startswith("/["):
        return part.strip("/")
    if part.startswith("/"):
        return f'"{part[1:-1]}"'
    return _name(part) if part[0].isalpha() or part[0] == "_" else part


@lru_cache(maxsize=4096)
def standing(rules: Rules, text: str) -> Standing:
    """Say where a text stands among those of a grammar."""
    return _Derivation(_completable(rules), text).standing()


@lru_cache(maxsize=64)
def _completable(rules: Rules) -> Mapping[str, Node]:
    """Give the rules without what no text completes: what must refer to itself for ever."""
    ending: set[str] = set()
    while more := {name for name, node in rules if name not in ending and _can_end(node, ending)}:
        ending |= more
    return {name: _without(node, ending) for name, node in rules}


def _can_end(node: Node, ending: Set[str]) -> bool:
    match node:
        case Reference(name):
            return name in ending
        case Parts(parts):
            return all(_can_end(part, ending) for part in parts)
        case Choice(parts):
            return any(_can_end(part, ending) for part in parts)
        case Repeat(part, least):
            return least == 0 or _can_end(part, ending)
    return True


def _without(node: Node, ending: Set[str]) -> Node:
    if not _can_end(node, ending):
        return Choice(())
    match node:
        case Parts(parts):
            return Parts(tuple(_without(part, ending) for part in parts))
        case Choice(parts):
            return Choice(tuple(_without(part, ending) for part in parts))
        case Repeat(part, least, most):
            return Repeat(_without(part, ending), least, most)
    return node


class _Derivation:
    """All ways to derive a text.

    Args:
        rules: the grammar.
        text: the text.
    """

    def __init__(self, rules: Mapping[str, Node], text: str) -> None:
        self._rules, self._text, self._beyond = rules, text, len(text) + 1
        self._known: dict[tuple[str, int], set[int]] = {("root", 0): set()}

    def standing(self) -> Standing:
        """Say where the text stands."""
        before: dict[tuple[str, int], set[int]] = {}
        while before != self._known:
            before = dict(self._known)
            for name, at in before:
                self._known[name, at] = self._ends(self._rules[name], at)
        ends = self._known["root", 0]
        return Standing(len(self._text) in ends, self._beyond in ends)

    def _ends(self, node: Node, at: int) -> set[int]:
        match node:
            case Literal(text):
                return self._after(text, at)
            case Class(regex):
                rest = self._text[at : at + 1]
                return {at + 1} if not rest or re.fullmatch(_in_python(regex), rest) else set()
            case Reference(name):
                return self._known.setdefault((name, at), set())
            case Choice(parts):
                return set().union(*(self._ends(part, at) for part in parts))
            case Parts(parts):
                places = {at}
                for part in parts:
                    places = self._each(part, places)
                return places
            case Repeat(part, least, most):
                return self._repeated(part, least, most, at)

    def _after(self, text: str, at: int) -> set[int]:
        rest = self._text[at:]
        if rest.startswith(text):
            return {at + len(text)}
        return {self._beyond} if text.startswith(rest) else set()

    def _repeated(self, part: Node, least: int, most: int | None, at: int) -> set[int]:
        places, count = {at}, 0
        while count < least and places != (after := self._each(part, places)):
            places, count = after, count + 1
        found, count = set(places), max(count, least)
        while most is None or count < most:
            places = self._each(part, places) - found
            if not places:
                break
            found |= places
            count += 1
        return found

    def _each(self, part: Node, places: Iterable[int]) -> set[int]:
        """Go on by a part from each place; what is beyond stays there."""
        return set().union(*({at} if at == self._beyond else self._ends(part, at) for at in places))


def _in_python(regex: str) -> str:
    """Write a class in the notation of Python's expressions."""
    return re.sub(r"\\x\{([0-9a-fA-F]+)\}", lambda found: f"\\U{int(found[1], 16):08x}", regex)
