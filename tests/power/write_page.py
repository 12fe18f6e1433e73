"""Writes `docs/faults.md`: every planted fault, the law that finds it, and the smallest case in which it does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from power.catalogue import FAULTS
from power.fault import Fault
from unspool_testing import LAWS
from unspool_testing.proof import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

BEGINNING = """\
# Planted faults

The laws of `unspool check` are only worth as much as the faults that they find. So faults are planted on purpose: slips
that a good programmer makes, in our own plugins and in the core, one at a time. A law must find each of them, and must
hold again when the slip is undone. This page is written by `make proof`, with fixed seeds; the catalogue is
`tests/power/catalogue`.
"""


def page(found: Mapping[str, Verdict]) -> str:
    """Write the page from the verdict on each fault, by its name."""
    counts = Counter(fault.law for fault in FAULTS)
    laws = ", ".join(f"`{law}` {counts[law]}" for law in LAWS if counts[law])
    rows = [f"| [{fault.name}](#{_anchor(fault)}) | `{fault.where}` | `{fault.law}` |" for fault in FAULTS]
    head = [BEGINNING, f"{len(FAULTS)} faults, by the law that finds them: {laws}.", ""]
    table = ["| fault | where | found by |", "|---|---|---|", *rows, ""]
    return "\n".join([*head, *table, *(_section(fault, found[fault.name]) for fault in FAULTS)])


def listed(text: str) -> list[tuple[str, str, str]]:
    """Read the table of a page: name, where, law."""
    return re.findall(r"^\| \[(.+?)\]\(#.+?\) \| `(.+?)` \| `(\w+?)` \|$", text, re.MULTILINE)


def _section(fault: Fault, verdict: Verdict) -> str:
    assert verdict.case is not None, f"{fault.law} does not see that {fault.name}"
    change = "\n".join(slip.change for slip in fault.slips)
    return (
        f"### {fault.name[0].upper()}{fault.name[1:]}\n\n"
        f"```text\n{change}\n```\n\n"
        f"`{fault.law}`: {_flat(verdict.reason)}\n\n"
        f"```text\n{verdict.case.write()}\n```\n"
    )


def _flat(reason: str) -> str:
    return re.sub(r"([<>|*_])", r"\\\1", reason)


def _anchor(fault: Fault) -> str:
    return re.sub(r"[^\w -]", "", fault.name.lower()).replace(" ", "-")
