"""The account of a broken law: what was found, the step at which it went wrong, and a test that reproduces it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from unspool_testing.case import Case, explicit, noting_tables
from unspool_testing.driver import Record, Run, recording
from unspool_testing.known import Known

if TYPE_CHECKING:
    from unspool_testing.law import Law
    from unspool_testing.subject import Subject

MOST_ROWS = 6
"""Most rows of a step that are shown."""


def account(law: Law, subject: Subject, case: Case, error: Exception) -> str:
    """Write all that is known about a case in which a law is broken."""
    with recording() as runs, noting_tables() as tables:
        try:
            law.check(case, subject.known)
            again = "It held when the same case was run once more: something outside the case decides.\n"
        except Exception:
            again = ""
    shown = explicit(case, tables)
    if shown is not case:
        try:
            law.check(shown, subject.known)
            shown = case  # not the same when written out (a companion reads other layers, say)
        except Exception:
            pass
    parts = [
        f"{law.name}: {law.says}",
        str(error).strip() + "\n" + again if again else str(error).strip(),
        _trace(runs),
        f"To reproduce it:\n\n{textwrap.indent(reproduction(law, subject, shown), '    ')}",
    ]
    return "\n\n".join(part for part in parts if part)


def reproduction(law: Law, subject: Subject, case: Case) -> str:
    """Write a test that runs one case of a law."""
    check, kind = law.check.__name__, subject.kind  # type: ignore[attr-defined]
    header, known = f"from unspool_testing import {check}\n", ""
    if subject.name in subject.known.instances:
        header = f"from unspool_testing import Subject, {check}\n"
        known = ", Subject.find(the_object_that_was_given).known"
    elif subject.name not in Known.installed().registry:
        header = f"from {kind.__module__} import {kind.__name__}\nfrom unspool_testing import Subject, {check}\n"
        known = f", Subject.find({kind.__name__}).known"
    return (
        f"{header}\n\n"
        f"def test_{law.name}_of_{_identifier(subject.name)}() -> None:\n"
        f'    {check}("""\n{textwrap.indent(case.write(), " " * 8)}\n    """{known})\n'
    )


def _identifier(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


# ---- the step that went wrong ----------------------------------------------------------------------------------------


def _trace(runs: Sequence[Run]) -> str:
    """Show the first place where two runs part; of one run alone, its last rounds."""
    runs = [run for run in runs if run.records]
    if not runs:
        return ""
    for at, one in enumerate(runs):
        for other in runs[at + 1 :]:
            if parting := _parting(one, other):
                place, first, second = parting
                request, tokens, stream = place
                where = f"request {request}, after the new tokens {list(tokens)}, stream {stream}"
                lines = [f"Where two runs part: {where}"]
                for run, (step, row) in ((one, first), (other, second)):
                    lines += [f"  {run.name or 'a run'}, step {step}:", *(f"    {line}" for line in _told(row))]
                return "\n".join(lines)
    last = runs[-1]
    lines = [f"The last rounds of {last.name or 'the run'}:"]
    rows = [(step, row) for step, row in _rows(last.records)][-MOST_ROWS:]
    for step, row in rows:
        lines.append(f"  step {step}, request {row['request']}, after {row['new_token_ids']}, stream {row['stream']}:")
        lines += [f"    {line}" for line in _told(row)]
    return "\n".join(lines)


Place = tuple[str, tuple[int, ...], int]


def _parting(one: Run, other: Run) -> tuple[Place, tuple[int, Any], tuple[int, Any]] | None:
    """Find the shortest path of one request at which two runs did not do the same."""
    first, second = ({_place(row): (step, row) for step, row in _rows(run.records)} for run in (one, other))
    for place in sorted(first.keys() & second.keys(), key=lambda place: (len(place[1]), place)):
        if _done(first[place][1]) != _done(second[place][1]):
            return place, first[place], second[place]
    return None


def _place(row: Any) -> Place:
    return row["request"], tuple(row["new_token_ids"]), row["stream"]


def _done(row: Any) -> Any:
    children = [(c["token"], c["stream"], c["finish"], c["dropped"]) for c in row["children"]]
    tops = [[token for token, _ in change["top_after"]] for change in row["transforms"]]
    return children, tops, row["dead"], sorted(row["held"])


def _rows(records: Sequence[Record]) -> Iterator[tuple[int, Any]]:
    for record in records:
        if record["event"] == "round":
            yield from ((record["step"], row) for row in record["rows"])


def _told(row: Any) -> Iterator[str]:
    for change in row["transforms"]:
        banned = f", forbade {change['banned']}" if change["banned"] else ""
        yield f"{change['plugin']}{banned}: {_tops(change['top_before'])} -> {_tops(change['top_after'])}"
    if row["dead"]:
        yield "every token is forbidden"
    if row["held"]:
        yield f"held, to look at {row['held']}"
    for child in row["children"]:
        marks = [child["finish"] or "", "dropped" if child["dropped"] else "", "accepted" if child["accepted"] else ""]
        score = "" if child["score"] is None else f", score {child['score']:.9g}"
        said = ", ".join(mark for mark in marks if mark)
        yield f"grew {child['token']} in stream {child['stream']}{score}{f' ({said})' if said else ''}"
    if not row["children"] and not row["held"] and not row["dead"]:
        yield "grew nothing"


def _tops(tops: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{token}:{value:.3g}" for token, value in tops)
