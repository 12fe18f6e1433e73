"""`unspool check`: the laws, proven on one plugin, and the least case that breaks each one that is broken.

Exit codes: 0 every law that applies held, or was broken as expected; 1 one did not; 2 the input is wrong.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported

if TYPE_CHECKING:
    from rich.table import Table

    from unspool_testing.law import Law
    from unspool_testing.proof import Verdict
    from unspool_testing.subject import Subject

LAW_BROKEN = 1
_WIDE = 100


def law_names(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a law."""
    from unspool_testing.laws import LAWS

    return [(law.name, law.says) for law in LAWS.values() if law.name.startswith(incomplete)]


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A plugin that is installed, or module:Class.", autocompletion=options.plugin_names
        ),
    ],
    params: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="Parameters to keep, as in a config; all others are drawn from their bounds.",
            show_default=False,
        ),
    ] = None,
    law: Annotated[
        list[str] | None,
        typer.Option(metavar="LAW", help="Prove this law only; repeat for more.", autocompletion=law_names),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAW=REASON",
            help="A law that is known to be broken, and why; repeat for more. It fails if the law holds.",
            autocompletion=law_names,
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="How many cases are tried of each law.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the cases.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Processes; as many as there are cores.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
    debug: options.Debug = False,
) -> None:
    """Prove the laws that every plugin keeps on one plugin."""
    with reported(debug):
        from unspool.cli.output import rendered, write
        from unspool_testing.expected import check_expected, find_laws
        from unspool_testing.subject import Subject

        if ":" in name:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the module may lie in this folder
        subject = Subject.find(name, params=read_params(name, params))
        laws = find_laws(law or (), "--law")
        expected = _read_expected(expect or ())
        check_expected(expected, subject, "--expect")
        started = time.monotonic()
        verdicts = _prove(laws, subject, jobs, examples, seed)
        wrong = [verdict for verdict in verdicts if _is_wrong(verdict, expected)]
        if as_json:
            write(json.dumps(_record(subject, verdicts, expected, seed), ensure_ascii=False, indent=2) + "\n")
        else:
            write(rendered(_table(verdicts, expected)))
            for verdict in wrong:
                write(_account(verdict))
            took = f"in {time.monotonic() - started:.1f} s"
            write(f"\n{_caution(subject)}\n{_summary(verdicts, expected)}, {took}\n")
        if wrong:
            raise typer.Exit(LAW_BROKEN)


def _caution(subject: Subject) -> str:
    """Say what these laws cannot have seen, for want of claims."""
    claims = subject.known.claims.get(subject.name)
    if claims is not None:
        named = claims.__qualname__ if isinstance(claims, type) else claims.value
        return f"Its claims are those of {named}."
    own = "what it chooses" if subject.is_strategy else "what it does to a row"
    return f"It claims nothing, so no law knows whether {own} is right: see docs/laws.md, claims."


def read_params(name: str, text: str | None) -> Mapping[str, Any]:
    """Read parameters in the forms that a config has: `0.9`, `k=3,q=4`, or a mapping in YAML or JSON.

    Raises:
        ConfigError: they cannot be read, or there is no such plugin.
    """
    import yaml

    from unspool.errors import InputError
    from unspool.plugin import Plugin
    from unspool.registry import BrokenPlugin, Entry, Registry
    from unspool.spec import Off, parse_spec
    from unspool_testing.known import Known

    if text is None:
        return {}
    registry, called = Known.installed().registry, name
    if ":" in name:
        called = name.rpartition(":")[2]
        try:
            kind = Entry(called, name).plugin
        except BrokenPlugin:
            kind = Plugin  # a class of transformers, whose arguments have names only
        registry = Registry([]).with_plugins({called: kind})
    try:
        mapping = yaml.safe_load(text) if text.lstrip().startswith("{") else None
    except yaml.YAMLError as error:
        raise InputError("--params", text, f"it cannot be read: {getattr(error, 'problem', None) or error}") from error
    spec = parse_spec(f"{called}:{text}" if mapping is None else {called: mapping}, registry)
    if isinstance(spec, Off):
        raise InputError("--params", text, "parameters, and this switches the plugin off")
    return spec.params


def _read_expected(given: Sequence[str]) -> dict[str, str]:
    from unspool.errors import InputError

    expected = {}
    for pair in given:
        name, equals, reason = pair.partition("=")
        if not equals:
            raise InputError("--expect", pair, "LAW=REASON")
        expected[name.strip()] = reason.strip()
    return expected


def _prove(laws: Sequence[Law], subject: Subject, jobs: int | None, examples: int | None, seed: int) -> list[Verdict]:
    """Prove laws, with a bar where stderr is a terminal. Give the verdicts in the order of the laws."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging as transformers_logging

    from unspool_testing.proving import prove_all

    quiet: Any = transformers_logging  # its functions have no types
    quiet.set_verbosity_error()
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("proving", total=len(laws))
    verdicts = {}
    with prove_all(laws, subject, jobs=jobs, examples=examples, seed=seed) as ended, bar:
        for verdict in ended:
            verdicts[verdict.law] = verdict
            bar.update(task, advance=1, description=f"{verdict.law.name}: {verdict.status.replace('_', ' ')}")
    return [verdicts[law] for law in laws]


def _is_wrong(verdict: Verdict, expected: Mapping[str, str]) -> bool:
    if verdict.status == "not_applicable":
        return False
    return (verdict.status == "broken") != (verdict.law.name in expected)


def _table(verdicts: Sequence[Verdict], expected: Mapping[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("law", "verdict"):
        table.add_column(column, no_wrap=True)
    for column in ("cases", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for verdict in verdicts:
        word, style = _said(verdict, expected)
        law, note = verdict.law.name, expected.get(verdict.law.name) or verdict.reason
        if verdict.status == "not_applicable":
            table.add_row(law, Text(word, style=style), "", "", Text(note, style=style))
        else:
            table.add_row(law, Text(word, style=style), str(verdict.examples), f"{verdict.seconds:.1f}", Text(note))
    return table


def _account(verdict: Verdict) -> str:
    """Write what broke a law. It is there to be pasted, so nothing in it is folded or coloured."""
    if verdict.status == "held":
        return ""
    why = textwrap.fill(f"Why it matters: {verdict.law.why}", _WIDE)
    return f"\n{verdict.counterexample.strip()}\n\n{why}\n"


def _summary(verdicts: Sequence[Verdict], expected: Mapping[str, str]) -> str:
    counts = Counter(_said(verdict, expected)[0] for verdict in verdicts)
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _said(verdict: Verdict, expected: Mapping[str, str]) -> tuple[str, str]:
    if verdict.status == "not_applicable":
        return "not applicable", "dim"
    if verdict.law.name not in expected:
        return ("held", "green") if verdict.status == "held" else ("broken", "bold red")
    return ("broken as expected", "yellow") if verdict.status == "broken" else ("held unexpectedly", "bold red")


def _record(subject: Subject, verdicts: Sequence[Verdict], expected: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Give everything for a program to read."""
    return {
        "plugin": subject.name,
        "params": dict(subject.params),
        "seed": seed,
        "ok": not any(_is_wrong(verdict, expected) for verdict in verdicts),
        "laws": [
            {
                "law": verdict.law.name,
                "says": verdict.law.says,
                "why": verdict.law.why,
                "status": verdict.status,
                "expected": expected.get(verdict.law.name),
                "reason": verdict.reason,
                "counterexample": verdict.counterexample,
                "case": verdict.case.write() if verdict.case is not None else None,
                "examples": verdict.examples,
                "seconds": round(verdict.seconds, 3),
            }
            for verdict in verdicts
        ],
    }
