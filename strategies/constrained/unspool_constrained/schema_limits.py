"""What a JSON schema may cost to compile: schemas that would take minutes or gigabytes are refused before they do.

Large schemas are fine: thousands of properties, or of alternatives, take half a second. What explodes is a string that
must match many patterns at once, as the product of their automata does, and a number that must be a multiple of a large
one. So these are counted along `allOf`, `$ref` and neighbouring keywords, which all must hold together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import prod
from typing import Any

from unspool_constrained.engine import GrammarError

LONGEST = 1_000_000
"""Characters of a schema."""
DEEPEST = 48
"""Levels of nesting."""
MOST_PATTERNS = 8
"""Patterns and formats that one string must match together."""
MOST_PARTS = 100_000
"""Subschemas that are looked at."""
LARGEST_MULTIPLE = 100_000
"""The product of the multiples that one number must be of."""
_ORDERS = "x-guidance"
"""In a schema: options of the engine."""


def check_schema(schema: Any, text: str) -> None:
    """Raise a `GrammarError` where compiling a schema would take too much, or where it gives orders to the engine."""
    if len(text) > LONGEST:
        raise GrammarError(f"a schema of at most {LONGEST:,} characters, not {len(text):,}")
    for part, depth in _parts(schema):
        if depth > DEEPEST:
            raise GrammarError(f"a schema of at most {DEEPEST} levels")
        if isinstance(part, dict) and _ORDERS in part:
            raise GrammarError(f"a schema without `{_ORDERS}`: the options are ours")
    counter = _Counter(schema)
    for part, _ in _parts(schema):
        if isinstance(part, dict):
            patterns, multiple = counter.together(part)
            if patterns > MOST_PATTERNS:
                raise GrammarError(f"at most {MOST_PATTERNS} of `pattern` and `format` for one string")
            if multiple > LARGEST_MULTIPLE:
                raise GrammarError(f"a `multipleOf` of at most {LARGEST_MULTIPLE:,} steps of its last digit")


def _parts(schema: Any) -> Iterator[tuple[Any, int]]:
    """List all values in a schema with their depth, without recursion."""
    waiting = [(schema, 0)]
    while waiting:
        part, depth = waiting.pop()
        yield part, depth
        if depth > DEEPEST:
            continue
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [(each, depth + 1) for each in inner]


class _Counter:
    """Counts what must hold together.

    Args:
        schema: the whole, for its references.
    """

    def __init__(self, schema: Any) -> None:
        self._schema, self._seen = schema, 0
        self._known: dict[int, tuple[int, int]] = {}

    def together(self, part: Any) -> tuple[int, int]:
        """Give, of one value, how many patterns it must match and the product of its multiples."""
        if not isinstance(part, Mapping):
            return 0, 1
        if id(part) in self._known:
            return self._known[id(part)]
        self._known[id(part)] = 0, 1  # a reference to itself adds nothing
        self._seen += 1
        if self._seen > MOST_PARTS:
            raise GrammarError(f"a schema of at most {MOST_PARTS:,} parts")
        found = [self.together(each) for each in _listed(part.get("allOf"))]
        for key in ("anyOf", "oneOf"):  # of which one holds, multiplied out with what stands beside them
            inner = [self.together(each) for each in _listed(part.get(key))]
            found += [(max(n for n, _ in inner), max(m for _, m in inner))] if inner else []
        if isinstance(reference := part.get("$ref"), str):
            found.append(self.together(_resolved(self._schema, reference)))
        own = sum(key in part for key in ("pattern", "format"))
        patterns = own + sum(n for n, _ in found)
        multiple = _steps(part.get("multipleOf")) * prod(m for _, m in found)
        self._known[id(part)] = patterns, multiple
        return patterns, multiple


def _steps(multiple: Any) -> int:
    """Give a multiple in units of its last digit: 0.25 is 25."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not 0 < multiple < float("inf"):
        return 1  # the engine says what is wrong with it
    numerator = Fraction(str(multiple))
    while numerator.denominator > 1:
        numerator *= 10
    return numerator.numerator


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolved(schema: Any, reference: str) -> Any:
    """Follow a reference inside a schema; None where it leads elsewhere, which the engine refuses."""
    if not reference.startswith("#/"):
        return schema if reference == "#" else None
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        elif isinstance(schema, dict) and name in schema:
            schema = schema[name]
        else:
            return None
    return schema
