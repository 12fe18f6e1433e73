"""What becomes of the official JSON-Schema-Test-Suite under `json_schema`: runs it, and writes docs/json-schemas.md.

Each schema of draft 2020-12 is compiled as a request's is, for a vocabulary of bytes, and each instance is given to it
byte by byte. Why a valid one is rejected is found by experiment: something about it is changed, and it is tried again.
The suite is outside data and need not be there.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

from tables import table

from unspool_constrained.engine import GrammarError, Position
from unspool_constrained.guidance import ENGINE
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.languages import Schema
from unspool_constrained.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("UNSPOOL_TEST_DATA", ROOT.parent / "shared" / "data"))
SUITE = DATA / "json-schema-test-suite" / "tests" / "draft2020-12"
ABSENT = "UNSPOOL_TEST_DATA names no folder with the JSON-Schema-Test-Suite"
BYTES = Vocabulary([bytes([byte]) for byte in range(256)], lambda text: list(text.encode()))
MOST_ORDERS = 1000
"""Orders of its properties in which an instance is tried."""

INTRODUCTION = """\
# JSON schemas

What becomes of the [JSON-Schema-Test-Suite](https://github.com/json-schema-org/JSON-Schema-Test-Suite), draft
2020-12, under the constraint [`json_schema`](../strategies/constrained/README.md#json-schemas). The suite has
schemas, and for each instances that are valid and instances that are not.

A schema is compiled as that of a request is, with compact whitespace, for a model whose tokens are the 256 bytes.
`true` and `false` stand in `{"allOf": [schema]}`, as the parameter is an object. Nothing is fetched, so documents
that the suite keeps beside its schemas are not found.

An instance is written as `json.dumps(instance, separators=(",", ":"), ensure_ascii=False)`, with its properties in
the order in which the suite has them, and given byte by byte. It is *taken* if every byte is allowed and the text may
end after the last one, and *rejected* if not.

- Invalid and taken: the schema is not enforced.
- Valid and rejected: the model may not say something that the schema allows. *Why* was found by trying the instance
  again with one thing changed.
- Refused: something in the schema cannot be enforced, and the request fails before its first token."""
REQUIRED = """\
What every validator must do. To a validator `format` is a note, unless it is told to look at it. Here it is
enforced."""
OPTIONAL = """\
What validators may leave out or do otherwise: above all, enforcing `format`. Here it is enforced as far as a regular
expression goes. Nothing is computed, so there are dates, leap seconds and encoded host names that are taken although
they do not exist. A `pattern` is read as Rust's `regex` reads it, and JavaScript reads a few characters otherwise."""
SEVERAL = "A schema that is refused for several keywords is counted with each of them."

REFUSALS = [
    (r"oneOf constraints are not supported", "`oneOf` whose alternatives are not known to exclude each other"),
    (r"Resource '", "`$ref` to another document"),
    (r"Unknown format: (\S+)", r"`format: \1`"),
    (r"Unsatisfiable schema", "nothing satisfies it"),
    (r"Expected positive integer for '", "a count that is written as a fraction, `2.0`"),
    (r"patternProperty regexes .* are not disjoint", "`patternProperties` that may overlap"),
    (r"`multipleOf`", "`multipleOf` a large number"),
    (r"Failed to generate regex for float range", "a large bound of a number"),
    (r"regex parse error", "`pattern` in another notation than Rust's"),
]
"""What the engine says of a schema that it refuses -> what about it."""


@dataclass(frozen=True)
class Instance:
    """One instance of a schema.

    Args:
        schema: under which it was tried.
        group: what the suite says of the schema.
        name: what the suite says of the instance.
        value: the instance.
        valid: the suite says that the schema takes it.
        taken: the constraint lets it be written.
    """

    schema: Any
    group: str
    name: str
    value: Any
    valid: bool
    taken: bool


@dataclass(frozen=True)
class File:
    """What became of one file of the suite.

    Args:
        name: without its ending.
        schemas: how many there are.
        refused: what was said of each schema that was refused.
        instances: those of the other schemas.
    """

    name: str
    schemas: int
    refused: tuple[str, ...]
    instances: tuple[Instance, ...]

    @property
    def is_required(self) -> bool:
        """Tell whether every validator must do as this file says."""
        return not self.name.startswith("optional/")

    def those(self, *, valid: bool, taken: bool) -> list[Instance]:
        """List the instances of one kind."""
        return [each for each in self.instances if (each.valid, each.taken) == (valid, taken)]


# ---- the run ---------------------------------------------------------------------------------------------------------


def is_there() -> bool:
    """Tell whether the suite is where it is looked for."""
    return SUITE.is_dir()


def run(folder: Path) -> list[File]:
    """Try what is in the files of a folder and of the folders in it."""
    paths = sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).parts)
    return [_tried(path, path.relative_to(folder).with_suffix("").as_posix()) for path in paths]


def _tried(path: Path, name: str) -> File:
    groups = json.loads(path.read_text(encoding="utf-8"))
    refused, instances = list[str](), list[Instance]()
    for group in groups:
        schema, said = group["schema"], group["description"]
        try:
            taken = [takes(schema, written(test["data"])) for test in group["tests"]]
        except GrammarError as error:
            refused.append(str(error))
            continue
        for test, was_taken in zip(group["tests"], taken, strict=True):
            instances.append(Instance(schema, said, test["description"], test["data"], test["valid"], was_taken))
    return File(name, len(groups), tuple(refused), tuple(instances))


def takes(schema: Any, text: str) -> bool:
    """Tell whether a text can be written under a schema.

    Raises:
        GrammarError: the schema is refused.
    """
    position: Position | None = ENGINE.compile(language_of(schema), BYTES).start()
    for byte in text.encode("utf-8", "surrogatepass"):
        position = position.advance(byte) if position else None
    return position is not None and position.may_stop


def language_of(schema: Any) -> Schema:
    """Read a schema as the plugin's parameter is read."""
    return JsonSchema.language(JsonSchema.Params(schema=schema if isinstance(schema, dict) else {"allOf": [schema]}))


def written(value: Any) -> str:
    """Write an instance down."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ---- reasons ---------------------------------------------------------------------------------------------------------


def why_rejected(instance: Instance) -> str:
    """Say what to change, of a valid instance or of its schema, for it to be taken."""
    schema, value = instance.schema, instance.value
    if any(_is_taken(schema, other) for other in islice(_in_all_orders(value), MOST_ORDERS)):
        return "its properties are in another order than the schema's"
    if _is_taken(schema, _in_digits(value)):
        return "a number is written otherwise"
    for keyword in ("format", "pattern"):
        if _is_taken(_without(schema, keyword), value):
            return f"it is held to `{keyword}`, without which it is taken"
    return f"what comes is narrower than the schema, `{written(schema)}`"


def _is_taken(schema: Any, value: Any) -> bool:
    try:
        return takes(schema, written(value))
    except GrammarError:
        return False


def _in_all_orders(value: Any) -> Iterator[Any]:
    """Give a value with its properties in every order, at all depths."""
    if isinstance(value, dict):
        for inner in product(*(list(_in_all_orders(each)) for each in value.values())):
            yield from map(dict, permutations(zip(value, inner, strict=True)))
    elif isinstance(value, list):
        yield from map(list, product(*(list(_in_all_orders(each)) for each in value)))
    else:
        yield value


def _in_digits(value: Any) -> Any:
    """Write whole numbers without a fraction and without an exponent: 1.0 as 1."""
    if isinstance(value, dict):
        return {key: _in_digits(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_digits(each) for each in value]
    return int(Decimal(repr(value))) if isinstance(value, float) and value.is_integer() else value


def _without(schema: Any, keyword: str) -> Any:
    """Leave out a keyword whose value is a text."""
    if isinstance(schema, dict):
        kept = {key: each for key, each in schema.items() if key != keyword or not isinstance(each, str)}
        return {key: _without(each, keyword) for key, each in kept.items()}
    return [_without(each, keyword) for each in schema] if isinstance(schema, list) else schema


def why_refused(said: str) -> list[str]:
    """Name what cannot be enforced, from what the engine says of a schema."""
    if match := re.search(r"Unimplemented keys: (\[.*\])", said):
        return [f"`{keyword}`" for keyword in json.loads(match[1])]
    for pattern, reason in REFUSALS:
        if match := re.search(pattern, said):
            return [match.expand(reason)]
    return [said]


# ---- the page --------------------------------------------------------------------------------------------------------


def page(files: list[File]) -> str:
    """Give the page from what became of all files."""
    parts = [INTRODUCTION]
    for title, said, required in (("Required", REQUIRED, True), ("Optional", OPTIONAL, False)):
        part = [file for file in files if file.is_required == required]
        parts += [f"## {title}\n\n{said}", _counts(part)]
        parts += [*_wrong(title, part), *_missed(title, part), *_refused(title, part)]
    return "\n\n".join(parts) + "\n"


def _counts(files: list[File]) -> str:
    """Write the table by file, and its sums."""
    kinds = [(True, True), (True, False), (False, False), (False, True)]
    counts = [
        [file.schemas, len(file.refused), *(len(file.those(valid=valid, taken=taken)) for valid, taken in kinds)]
        for file in files
    ]
    rows = [[file.name, *map(str, numbers)] for file, numbers in zip(files, counts, strict=True)]
    sums = [f"**{sum(column)}**" for column in zip(*counts, strict=True)]
    head = ["file", "schemas", "refused", "valid, taken", "valid, rejected", "invalid, rejected", "invalid, taken"]
    return table(head, [*rows, ["**all**", *sums]])


def _wrong(title: str, files: list[File]) -> Iterator[str]:
    rows = [[file.name, each.group, each.name] for file in files for each in file.those(valid=False, taken=True)]
    yield f"### {title}: invalid and taken"
    yield table(["file", "schema", "instance"], rows) if rows else "None."


def _missed(title: str, files: list[File]) -> Iterator[str]:
    missed = [(file.name, each) for file in files for each in file.those(valid=True, taken=False)]
    yield f"### {title}: valid and rejected"
    rows = [[name, each.group, each.name, why_rejected(each)] for name, each in missed]
    yield table(["file", "schema", "instance", "why"], rows) if rows else "None."


def _refused(title: str, files: list[File]) -> Iterator[str]:
    reasons = Counter(reason for file in files for said in file.refused for reason in why_refused(said))
    rows = [[reason, str(count)] for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    yield f"### {title}: refused\n\n{SEVERAL}"
    yield table(["what cannot be enforced", "schemas"], rows)
