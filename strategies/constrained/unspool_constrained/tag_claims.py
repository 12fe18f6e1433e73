"""What `tagged` claims to allow: a text that is read from its beginning, tag by tag.

Free text goes to the first place where a begin marker has been said. From there the text is the tag's, up to the first
end marker before which it is complete; after that it is free again.

Where an end marker could be read as more of the JSON or of the grammar before it, the claim is left open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from unspool_constrained.claims import allowed, text_of
from unspool_constrained.grammar_claims import Standing, rules_of_grammar, standing
from unspool_constrained.schema_claims import rules_of_schema


class Tagged:
    """Free text, and tags."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Read the text."""
        text = text_of(request, tokens, ended)
        if text is None:
            return False
        return allowed(params, any(one.takes(ended) for one in _read(text, params.tags, params.required)), ended)

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """Never end a text: more of it may always come."""
        return None


def _read(text: str, tags: Sequence[Any], required: bool) -> Iterator[Standing]:
    """Read free text and what follows. `required`: there must be a tag in it."""
    for end in range(1, len(text) + 1):
        begun = [tag for tag in tags if text[:end].endswith(tag.begin)]
        for tag in begun:
            yield from _inside(text[end:], tag, tags)
        if begun:
            return
    yield Standing(whole=not required, more=True)


def _inside(text: str, tag: Any, tags: Sequence[Any]) -> Iterator[Standing]:
    """Read what stands in a tag, its end marker and what follows."""
    for end in range(len(text) + 1):
        inner, rest = text[:end], text[end:]
        if not _inner(tag, inner).whole:
            continue
        if tag.regex is None and _inner(tag, inner + tag.end[0]).takes(ended=False):
            raise NotImplementedError(f"an end marker that could be more of what stands before it: {tag.end!r}")
        if rest.startswith(tag.end):
            yield from _read(rest.removeprefix(tag.end), tags, required=False)
            return  # at the first end marker
        if tag.end.startswith(rest):
            yield Standing(whole=False, more=True)
    if _inner(tag, text).more:
        yield Standing(whole=False, more=True)


def _inner(tag: Any, text: str) -> Standing:
    """Say where a text stands in a tag's language. Of an expression, `more` means that it begins one of its texts."""
    if tag.regex is not None:
        import regex  # type: ignore[import-untyped]

        whole, begins = (regex.fullmatch(tag.regex, text, partial=partial) is not None for partial in (False, True))
        return Standing(whole, begins)
    if tag.grammar is not None:
        return standing(rules_of_grammar(tag.grammar), text)
    return standing(rules_of_schema(json.dumps(tag.json_schema)), text)
