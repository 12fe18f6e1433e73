"""GBNF grammars written as regular expressions, or as Lark, without changing what they mean.

GBNF speaks of characters. Lark speaks of terminals, each of which takes as much text as it can: `"ab" | "a" "bc"` as
terminals could never say "abc". So a grammar without recursion becomes a single regular expression, and any other one a
Lark grammar whose terminals are single characters. Both are exact; the second takes some milliseconds for a mask, where
most tokens are letters that a rule repeats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from unspool_constrained.gbnf import (
    Choice,
    Class,
    Literal,
    Node,
    Parts,
    Reader,
    Reference,
    Repeat,
    escaped,
    without_dead_ends,
)
from unspool_constrained.languages import Lark, Pattern

LONGEST_REGEX = 100_000
"""Characters of a regular expression into which a grammar without recursion is written out."""
_GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def language_of_grammar(text: str) -> Pattern | Lark:
    """Give the language of a grammar, in Lark or GBNF.

    Raises:
        GrammarError: it is neither; the message says where.
    """
    if not _GBNF.search(text):
        return Lark(text)
    rules = without_dead_ends(Reader(text).rules())
    regex = _as_regex(rules)
    return Lark(_as_lark(rules)) if regex is None else Pattern(regex)


def _as_regex(rules: Mapping[str, Node]) -> str | None:
    """Write a grammar as one regular expression; None where it refers to itself, or would become too long."""
    known: dict[str, str | None] = {}

    def of_rule(name: str) -> str:
        if name in known and known[name] is None:
            raise _NotRegular
        if name not in known:
            known[name] = None
            known[name] = f"(?:{_written(rules[name], of_rule, _escaped_all, '', '|')})"
        written = known[name]
        assert written is not None
        if len(written) > LONGEST_REGEX:
            raise _NotRegular
        return written

    try:
        return of_rule("root")
    except (_NotRegular, RecursionError):
        return None


class _NotRegular(Exception):
    """A grammar that is no short regular expression."""


def _as_lark(rules: Mapping[str, Node]) -> str:
    """Write a grammar as Lark, a terminal a character."""
    names = {name: "start" if name == "root" else f"r{number}" for number, name in enumerate(rules)}
    lines = [
        f"{names[name]}: {_written(node, names.__getitem__, _characters, ' ', ' | ')}" for name, node in rules.items()
    ]
    return "\n".join(lines) + "\n"


def _written(node: Node, of_rule: Callable[[str], str], of_text: Callable[[str], str], space: str, bar: str) -> str:
    """Write a node as a regular expression or as Lark, whose brackets and repetitions are the same."""
    opening = "(" if space else "(?:"

    def write(node: Node) -> str:
        match node:
            case Literal(text):
                return of_text(text)
            case Class(regex):
                return f"/{regex}/" if space else regex
            case Reference(name):
                return of_rule(name)
            case Parts(parts):
                return space.join(map(write, parts)) or of_text("")
            case Choice(parts):
                return f"{opening}{bar.join(map(write, parts))})"
            case Repeat(part, least, most):
                count = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
                count = count or f"{{{least},{'' if most is None else most}}}"
                return f"{opening}{write(part)}){count}"

    return write(node)


def _escaped_all(text: str) -> str:
    return "".join(map(escaped, text))


def _characters(text: str) -> str:
    return " ".join(json.dumps(character, ensure_ascii=False) for character in text) or '""'
