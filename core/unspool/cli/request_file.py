"""A file of requests, one JSON object a line, read lazily.

A line that cannot be read becomes an error record, and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from unspool.errors import InputError
from unspool.request import Request, Result
from unspool.spec import nearest

REPLACE = "plugins!"
FIELDS = (*(field.name for field in dataclasses.fields(Request) if field.name != "replace_plugins"), REPLACE)


@dataclass(frozen=True)
class BadLine:
    """A line that is no request.

    Args:
        line: its number, from 1.
        id: the id that it would have.
        error: what is wrong.
    """

    line: int
    id: str
    error: InputError

    def to_dict(self) -> dict[str, Any]:
        """Give its record: that of a result, with the line's number."""
        return {**Result(self.id, "", (), error=self.error).to_dict(), "line": self.line}


def read_requests(
    lines: Iterable[bytes], seed_of: Callable[[str], int], skip: Callable[[int, str], bool]
) -> Iterator[Request | BadLine]:
    """Read requests, one a line. Blank lines are passed over.

    Args:
        lines: of the file.
        seed_of: gives the seed of a request that names none, from its id.
        skip: tells, of a line's number and id, whether it was done in an earlier run.
    """
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _parse(line, str(number))
        except InputError as error:
            found: Request | BadLine = BadLine(number, str(number), error)
        else:
            assert request.id is not None
            seed = seed_of(request.id) if request.seed is None else request.seed
            found = dataclasses.replace(request, seed=seed)
            if request.id in first:
                taken = f"an id of its own: line {first[request.id]} has the same"
                found = BadLine(number, request.id, InputError("id", request.id, taken))
            first.setdefault(request.id, number)
        if not skip(number if isinstance(found, BadLine) else 0, str(found.id)):
            yield found


def _parse(line: bytes, default_id: str) -> Request:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError("line", line, f"UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError("line", line.decode().strip(), f"JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError("line", record, "a JSON object with a prompt")
    for name, value in record.items():
        if name not in FIELDS:
            raise InputError(name, value, f"no such field: {nearest(name, FIELDS)}allowed: {', '.join(FIELDS)}")
    if "prompt" not in record:
        raise InputError("prompt", None, "it is missing")
    if REPLACE in record:
        if "plugins" in record:
            raise InputError(REPLACE, record[REPLACE], "plugins and plugins! exclude each other")
        record |= {"plugins": record.pop(REPLACE), "replace_plugins": True}
    given = record.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise InputError("id", given, "text or a whole number")
    go_on = record.get("continue_final_message", False)
    if not isinstance(go_on, bool):
        raise InputError("continue_final_message", go_on, "true or false")
    return Request(**{**record, "id": default_id if given is None else str(given)})
