"""What constraints claim to allow, written a second time: as plain questions about texts.

A text is allowed as a whole if it is in the language, and as a beginning if some text of the language begins with it.
The test kit holds the masks to that, token by token. Grammars, schemas and tags take more words: they have modules of
their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from unspool_constrained.vocabulary import vocabulary_of


def text_of(request: Any, tokens: Sequence[int], ended: bool) -> str | None:
    """Give the text of new tokens, without the end token that it may end with; None: there is a token without text."""
    if ended and tokens and tokens[-1] in request.end_ids:
        tokens = tokens[:-1]
    spelled = vocabulary_of(request.tokenizer).tokens
    pieces = [spelled[token] for token in tokens]
    return b"".join(pieces).decode(errors="replace") if all(pieces) else None


def allowed(params: Any, in_language: bool, ended: bool) -> bool:
    """Say whether a text is allowed, as its language says.

    Raises:
        NotImplementedError: room is kept to complete it, and what still fits is left open: it depends on a search.
    """
    if in_language and params.complete_within and not ended:
        raise NotImplementedError("a beginning that may be too long to be completed")
    return in_language


class Choices:
    """One of several strings."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Look through the list."""
        text = text_of(request, tokens, ended)
        if text is None:
            return False
        found = text in params.choices if ended else any(choice.startswith(text) for choice in params.choices)
        return allowed(params, found, ended)

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """End where no choice is longer."""
        text = text_of(request, tokens, False)
        longer = text is not None and any(c.startswith(text) and c != text for c in params.choices)
        return "grammar_end" if text in params.choices and not longer else None


class Regex:
    """What a backtracking matcher says."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Match the whole, or a part that more could follow."""
        import regex  # type: ignore[import-untyped]

        text = text_of(request, tokens, ended)
        found = text is not None and regex.fullmatch(params.pattern, text, partial=not ended) is not None
        return allowed(params, found, ended)


class AnyJson:
    """What parses."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Parse the whole, or complete a part in a few plain ways and parse that."""
        text = text_of(request, tokens, ended)
        if text is None:
            return False
        if ended:
            return _is_json(text, params)
        found = any(_is_json(text + more + closing, params) for more in _MORE for closing in _closings(text))
        return allowed(params, found, ended)

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """End what parses, but for a number: more digits may come."""
        text = text_of(request, tokens, False)
        is_closed = text is not None and _is_json(text, params) and not text[-1].isdigit()
        return "grammar_end" if is_closed else None


_MORE = (
    "",
    "0",
    '"',
    '":0',
    '"":0',
    ":0",
    '0":0',
    "null",
    "ull",
    "ll",
    "l",
    "true",
    "rue",
    "ue",
    "e",
    "alse",
    "lse",
    "se",
    '\\"',
)


def _closings(text: str) -> list[str]:
    """Give the brackets that are open at the end of a text, with and without a quote that may be open too."""
    plain = re.sub(r'"(?:[^"\\]|\\.)*("|$)', "", text)
    stack: list[str] = []
    for character in plain:
        if character in "[{":
            stack.append({"[": "]", "{": "}"}[character])
        elif character in "]}" and stack:
            stack.pop()
    closing = "".join(reversed(stack))
    kinds = [closing, *("".join(reversed(stack[:-1])) for _ in stack[:1])]
    return kinds + ([] if stack else ["]", "}"])


def _is_json(text: str, params: Any) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    if params.whitespace == "compact" and re.sub(r'("(?:[^"\\]|\\.)*")|\s+', r"\1", text) != text:
        return False
    if params.whitespace == "flexible" and text != text.strip():
        return False
    wanted = {"any": object, "object": dict, "array": list}[params.value]
    return isinstance(value, wanted)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
