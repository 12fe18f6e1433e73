"""The demo: a streamed answer of a real model, then one batch with several strategies, side by side.

    python docs/demo/demo.py

It does what a person would do: it runs the command line, and reads the results that come out.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of France? Answer in one sentence."
REQUESTS = "docs/demo/requests.jsonl"
CONFIG = ("-c", "docs/demo/demo.yaml")


def call(*arguments: str, capture: bool = False) -> str:
    """Show a command, run it, and leave with its exit code if it fails. With `capture`, give its stdout."""
    print(f"\n$ unspool {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-c", "from unspool.cli import main; main()", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def side_by_side(results: str) -> Table:
    """Put the results of the batch into a table, in the order of the requests."""
    ids = [json.loads(line)["id"] for line in (ROOT / REQUESTS).read_text(encoding="utf-8").splitlines()]
    table = Table(title="One prompt, one batch, several strategies", show_lines=True)
    for column in ("strategy", "text", "tokens", "ends by"):
        table.add_column(column, justify="right" if column == "tokens" else "left")
    for record in sorted(map(json.loads, results.splitlines()), key=lambda record: ids.index(record["id"])):
        best = record["hypotheses"][0]
        table.add_row(record["id"], best["text"].strip(), str(len(best["token_ids"])), best["finish_reason"])
    return table


def main() -> None:
    """Run the demo."""
    print("A model of 135 million parameters answers, token by token. It is converted once, when it is first used.")
    call("generate", QUESTION, *CONFIG, "--stats")
    results = call("run", REQUESTS, *CONFIG, "-o", "-", capture=True)
    console = Console(highlight=False)
    console.print()
    console.print(side_by_side(results))


if __name__ == "__main__":
    main()
