"""Extraction as JSON with a schema and without one: what is valid, and how fast, side by side on the real model.

    python benchmarks/extraction.py [--dtype float32] [--batches 1,8,32] [--count 50] [--new 160] [--data FOLDER]
                                    [--json OUT]

The texts are documents of Spec-Bench (summarisation and retrieval), cut to `--characters`. Of each the model is asked
for a few fields as JSON, greedily, in four ways: without a grammar; held to the schema, token by token; with text that
the schema forces as drafts; with those and `prompt_lookup`. All take turns at the same batches, so that a change of the
machine's speed meets all. A ratio is that of two sides' tokens a second, its figure the median of the rounds, with a
95 % interval by bootstrap; prompts count in it, and `ms a token` tells what each token after the first one took. Ends
with 1 if a text that was held to the schema is not valid by the package `jsonschema`, or if drafts changed one in
float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from figures import versions, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from speculation import interval, prompts_of

import unspool

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 60},
        "topic": {"enum": ["politics", "sport", "science", "business", "culture", "crime", "history", "other"]},
        "year": {"type": ["integer", "null"], "minimum": 1000, "maximum": 2100},
        "people": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 30}, "maxItems": 3},
        "places": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 30}, "maxItems": 3},
        "summary": {"type": "string", "minLength": 1, "maxLength": 140},
    },
    "required": ["title", "topic", "year", "people", "places", "summary"],
    "additionalProperties": False,
}
PLAIN = "no grammar"
"""The side that the others are compared with."""
HELD = "grammar"
"""The side whose texts those with drafts must have."""
UNLIKE = f"unlike {HELD}"


def sides() -> dict[str, list[Any]]:
    """Give the plugins of each side."""
    held = {"schema": SCHEMA, "complete_within": True}
    drafted: dict[str, Any] = {"json_schema": {**held, "draft_forced": True}}
    return {
        PLAIN: [],
        HELD: [{"json_schema": {**held, "draft_forced": False}}],
        "grammar, forced drafts": [drafted],
        "grammar, forced drafts, prompt_lookup": [drafted, "prompt_lookup"],
    }


def documents(folder: Path, count: int) -> list[str]:
    """Give the documents of the first prompts of Spec-Bench, without what those ask."""
    found = []
    for prompt in prompts_of(folder, count):
        before, _, text = prompt.partition("Summarize: ")
        found.append(prompt.rpartition("\n")[0] if before else text)
    if len(found) < count:
        raise SystemExit(f"{count} texts are asked for: {folder} holds {len(found)}")
    return found


def question(text: str) -> str:
    """Ask for the fields of a text."""
    topics = ", ".join(SCHEMA["properties"]["topic"]["enum"])
    return (
        "Extract these fields from the text, as one JSON object and nothing else: "
        f"title (at most 60 characters), topic (one of: {topics}), year (the one the text is about, or null), "
        "people (at most 3 names), places (at most 3 names), summary (one sentence of at most 140 characters).\n\n"
        f"Text: {text}"
    )


def is_valid(text: str) -> bool:
    """Tell whether a text, as it is, is JSON that the schema takes."""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


class Side:
    """One way to ask, and what came of it.

    Args:
        engine: with the model loaded.
        plugins: what the requests are held to and drafted by.
        new: most new tokens.
    """

    def __init__(self, engine: unspool.Engine, plugins: Sequence[Any], new: int) -> None:
        self._engine, self._plugins, self._new = engine, plugins, new
        self.speeds: list[float] = []
        self.results: list[unspool.Result] = []

    def ask(self, prompts: Sequence[str]) -> None:
        """Decode a batch."""
        fields: dict[str, Any] = {"strategy": "greedy", "plugins": list(self._plugins), "max_new_tokens": self._new}
        requests = [unspool.Request(prompt=prompt, id=str(i), **fields) for i, prompt in enumerate(prompts)]
        start = time.perf_counter()
        results = list(self._engine.run(requests, ordered=True))
        seconds = time.perf_counter() - start
        for result in results:
            if result.error is not None:
                raise result.error
        self.speeds.append(sum(len(result.token_ids) for result in results) / seconds)
        self.results += results

    def forget(self) -> None:
        """Count nothing of what was asked so far."""
        self.speeds, self.results = [], []

    def figures(self, plain: Side, held: Side) -> dict[str, Any]:
        """Say what came of it, beside two other sides."""
        stats = [result.stats for result in self.results]
        tokens, passes = sum(len(result.token_ids) for result in self.results), sum(s.forward_passes for s in stats)
        ratios = [own / other for own, other in zip(self.speeds, plain.speeds, strict=True)]
        paces = [(s.total_s - s.first_token_s) / (s.new_tokens - 1) for s in stats if s.new_tokens > 1]
        pairs = zip(self.results, held.results, strict=True)
        return {
            "texts": len(self.results),
            "valid %": round(100 * statistics.fmean(is_valid(result.text) for result in self.results), 1),
            "tok/s": [round(value, 2) for value in interval(self.speeds)],
            f"/ {PLAIN}": [round(value, 2) for value in interval(ratios)],
            "ms a token": round(1e3 * statistics.median(paces), 2) if paces else None,
            "tokens a pass": round(tokens / passes, 2),
            "tokens a text": round(tokens / len(self.results), 1),
            "drafted": sum(s.drafted for s in stats),
            "accepted": sum(s.accepted for s in stats),
            "ends": dict(Counter(result.hypotheses[0].finish_reason for result in self.results)),
            UNLIKE: None if self is plain else sum(mine.token_ids != other.token_ids for mine, other in pairs),
        }


def batches_of(prompts: Sequence[str], size: int) -> list[list[str]]:
    """Cut the prompts into batches; the last one is filled from the first prompts."""
    count = -(-len(prompts) // size)
    return [[prompts[i % len(prompts)] for i in range(k * size, (k + 1) * size)] for k in range(count)]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let all sides take turns at the same batches."""
    prompts = [question(text[: options.characters]) for text in documents(options.data, options.count)]
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        unspool.Engine.load("smollm2", dtype=options.dtype, device=options.device, prefix_cache=False) as engine,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        for size in options.batches:
            batches = batches_of(prompts, size)
            asked = {name: Side(engine, plugins, options.new) for name, plugins in sides().items()}
            bar = progress.add_task(f"batch {size}", total=len(asked) * len(batches))
            for side in asked.values():  # each side learns and warms up on what is not counted
                side.ask(prompts[-1:])
                side.forget()
            for batch in batches:
                for side in asked.values():
                    side.ask(batch)
                    progress.advance(bar)
            for name, side in asked.items():
                row = {"batch": size, "side": name, **side.figures(asked[PLAIN], asked[HELD])}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def faults(rows: Sequence[dict[str, Any]], dtype: str) -> list[str]:
    """List what must not be: texts that were held to the schema and are not valid, and drafts that changed a text."""
    found = []
    for row in rows:
        if row["side"] != PLAIN:
            where = f"batch {row['batch']}, {row['side']}"
            if row["valid %"] < 100:
                found.append(f"{where}: {row['valid %']} % of the texts are valid, must be 100 %")
            if dtype == "float32" and row[UNLIKE]:
                found.append(f"{where}: {row[UNLIKE]} texts differ from those without drafts")
    return found


def main() -> None:
    """Run the comparison and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--count", type=int, default=50, help="texts")
    parser.add_argument("--characters", type=int, default=1200, help="of each text")
    parser.add_argument("--new", type=int, default=160, help="most new tokens")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("UNSPOOL_TEST_DATA", "../shared/data")))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print(versions())
    rows = compare(options)
    write(options.json, rows)
    found = faults(rows, options.dtype)
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
