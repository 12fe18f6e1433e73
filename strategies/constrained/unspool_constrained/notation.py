"""Languages in llguidance's own notation: a dialect of Lark in which JSON schemas stand as `%json {...}`.

Strict throughout: keywords of JSON Schema that are not understood, and `oneOf` whose alternatives overlap, are errors,
never something near to what was asked. `no_forcing` is explained in `guidance.py`.
"""

from __future__ import annotations

import json
import re

from llguidance import regex_to_lark

from unspool_constrained.languages import Language, Lark, Pattern, Schema, Strings, Tag, TaggedText

_HEAD = '%llguidance {"no_forcing": true}\n'
_OWN_HEAD = re.compile(r"^[ \t]*%llguidance\b[^\n]*$", re.MULTILINE)


def lark_of(language: Language) -> str:
    """Write a language in llguidance's notation."""
    match language:
        case Lark():
            return _HEAD + _OWN_HEAD.sub("", language.text)  # its options would undo ours
        case Strings():
            # A terminal: thousands of alternatives of a rule would all stand side by side in the parser.
            return f"{_HEAD}start: CHOICE\nCHOICE: {' | '.join(map(quoted, language.strings))}"
        case TaggedText():
            return _HEAD + _tagged(language)
        case Schema() | Pattern():
            return f"{_HEAD}start: {_inline(language)}"


def quoted(text: str) -> str:
    """Write a text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _inline(language: Schema | Pattern) -> str:
    if isinstance(language, Pattern):
        return f"/{regex_to_lark(language.regex, use_ascii='')}/"
    schema = json.loads(language.text)
    if not isinstance(schema, dict):  # true and false are schemas too, and options need an object
        schema = {} if schema else {"anyOf": []}
    options = {"whitespace_flexible": not language.compact, "lenient": False, "coerce_one_of": False}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _tagged(language: TaggedText) -> str:
    """Write free text with tags.

    FREE has no begin marker in it. OPEN is free text up to the first begin marker: it is lazy, so it ends there at once
    and what follows is the tag's.
    """
    markers = " | ".join(f"/(?s:.*){_literal(tag.begin)}(?s:.*)/" for tag in language.tags)
    lines = [f"FREE: /(?s:.*)/ & ~({markers})"]
    for number, tag in enumerate(language.tags):
        lines += [f"OPEN_{number}: FREE {quoted(tag.begin)}", f"open_{number}[lazy]: OPEN_{number}"]
        lines += _body(number, tag)
    any_tag = " | ".join(f"tag_{number}" for number in range(len(language.tags)))
    return "\n".join([f"start: ({any_tag}){'+' if language.required else '*'} FREE", *lines])


def _body(number: int, tag: Tag) -> list[str]:
    open_, end = f"open_{number}", quoted(tag.end)
    match tag.inner:
        case Schema():
            return [f"tag_{number}: {open_} {_inline(tag.inner)} {end}"]
        case Pattern():  # lazy: its text ends with the first end marker after which it matches
            close = [f"CLOSE_{number}: INNER_{number} {end}", f"close_{number}[lazy]: CLOSE_{number}"]
            return [f"tag_{number}: {open_} close_{number}", f"INNER_{number}: {_inline(tag.inner)}", *close]
        case Lark():
            nested = tag.inner.text.replace("\n", "\n  ")
            return [f"tag_{number}: {open_} %lark {{\n  {nested}\n}} {end}"]


def _literal(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
