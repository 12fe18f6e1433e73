"""What a grammar costs a decode step, part by part, on the real model and its whole vocabulary.

    python benchmarks/constraints.py [--dtype float32] [--batches 1,32] [--steps 24] [--rounds 3] [--cpu]
                                     [--data FOLDER] [--json OUT]

The same prompts are decoded with a schema and without one, in turn, `draft_forced` off so that steps compare. A step
counts where every request of the batch decodes and no prompt runs. The functions of the constraint are timed from here,
on the loop's thread and each without those that it calls: that is what a grammar adds to the critical path. Masks are
filled on other threads meanwhile, so only the wait for them counts; but on few cores they take time from the pass, and
the difference of the two kinds of steps tells that. A cost is the median over the steps. On a machine that does other
work `--cpu` counts the loop's thread's own time instead, in which there is no waiting; torch needs one thread then.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from extraction import SCHEMA, documents
from figures import versions, write

import unspool
from unspool.forward import Forward
from unspool.group import Group
from unspool.loop import Loop
from unspool_constrained import constraint
from unspool_constrained.guidance import ENGINE, Guidance
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.languages import Schema
from unspool_constrained.vocabulary import vocabulary_of

GOAL = 3.0
"""Per cent of a step that a grammar may take."""
OURS = {
    "masks": (ENGINE, "masks"),
    "ends": (constraint, "allow_ends"),
    "apply": (JsonSchema, "logits_transform"),
    "prefetch": (JsonSchema, "pre_forward"),
    "advance": (JsonSchema, "stop_check"),
}
"""What runs for each step: the name of its row, and where the function stands. `stop_check` has all rows advance: timed
each by itself, 32 would seem to take 0.1 ms more."""
ONCE = {"initial": (JsonSchema, "initial"), "report": (JsonSchema, "report")}
"""What runs once a request. The report of a text that was cut short, as here, walks it again."""
CORE = {"copy of the logits": (Group, "working_copy")}
"""What the core does because a plugin edits logits."""
PROPERTIES = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0},
        "name": {"type": "string", "maxLength": 40},
        "email": {"type": "string", "pattern": "[a-z.]{1,20}@[a-z]{1,20}[.](com|org)"},
        "born": {"type": "string", "format": "date"},
        "height": {"type": "number", "minimum": 0, "maximum": 3},
        "member": {"type": "boolean"},
        "level": {"enum": ["basic", "silver", "gold"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "city": {"type": "string", "maxLength": 40}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "note": {"type": ["string", "null"], "maxLength": 80},
    },
    "required": ["id", "name", "email", "born", "level"],
    "additionalProperties": False,
}
"""A typical schema of ten properties."""

Spent = dict[str, float]
"""Seconds of each part, and of the `step`."""


class Clock:
    """Times functions, each without those that it calls which are timed as well.

    Args:
        now: gives seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, list[float]] = defaultdict(list)
        """Seconds of each call, with all that it calls."""
        self._running: list[str] = []
        self._since = 0.0
        self._thread = 0

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Time a function from now on, on the loop's thread."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return inner(*args, **kwargs)
            start = self.now()
            self._turn(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._turn(None)
                self.calls[part].append(self.now() - start)

        setattr(owner, name, timed)

    def begin(self) -> None:
        """Forget what was spent: a step begins on this thread."""
        self.spent, self._thread = defaultdict(float), threading.get_ident()

    def _turn(self, part: str | None) -> None:
        """Let a part begin, or the one that runs end."""
        now = self.now()
        if self._running:
            self.spent[self._running[-1]] += now - self._since
        self._since = now
        if part is None:
            self._running.pop()
        else:
            self._running.append(part)


class Steps:
    """Takes the time of every step in which all requests decode."""

    def __init__(self, clock: Clock) -> None:
        self.batch, self.seen = 0, list[Spent]()
        counted = False
        step, run = Loop.step, Forward.run

        def timed(loop: Loop) -> None:
            nonlocal counted
            clock.begin()
            start = clock.now()
            step(loop)
            seconds = clock.now() - start
            if counted:
                self.seen.append({**dict.fromkeys([*OURS, *CORE], 0.0), **clock.spent, "step": seconds})
            counted = False

        def looked_at(forward: Forward, plan: Any, groups: Any) -> None:
            nonlocal counted
            counted = not plan.pieces and sum(len(group.lives) for group in groups) == self.batch
            run(forward, plan, groups)

        Loop.step, Forward.run = timed, looked_at  # type: ignore[method-assign, assignment]

    def take(self) -> list[Spent]:
        """Give what was seen since the last time."""
        seen, self.seen = self.seen, []
        return seen


def decode(engine: unspool.Engine, prompts: Sequence[str], new: int, plugins: Sequence[Any]) -> None:
    """Decode a batch; without a grammar, on beyond the ends."""
    fields: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": new, "plugins": plugins}
    fields["ignore_eos"] = not plugins
    for result in engine.run([unspool.Request(prompt=prompt, **fields) for prompt in prompts]):
        if result.error is not None:
            raise result.error


def median_ms(steps: Sequence[Spent], part: str) -> float:
    """Give the median of a part over steps."""
    return statistics.median(step[part] for step in steps) * 1e3


def measure(
    engine: unspool.Engine, clock: Clock, steps: Steps, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Decode a batch with the schema and without, in turn, and tell what each part of a step took."""
    prompts = [f"Answer in JSON: what is this about? {text[:100]}" for text in documents(options.data, batch)]
    held = [{"json_schema": {"schema": SCHEMA, "draft_forced": False}}]
    seen: dict[bool, list[Spent]] = {False: [], True: []}
    differences = []
    clock.calls.clear()
    for round_ in range(options.rounds + 1):
        steps.batch = batch
        pair = {}
        for grammar in seen:
            decode(engine, prompts, (options.steps if round_ else 4) + 1, held if grammar else [])
            pair[grammar] = steps.take()
            if round_:  # the first one warms up
                seen[grammar] += pair[grammar]
        if round_:
            differences.append(median_ms(pair[True], "step") - median_ms(pair[False], "step"))
    without, with_ = median_ms(seen[False], "step"), median_ms(seen[True], "step")
    row: dict[str, Any] = {"batch": batch, "steps": len(seen[True]), "without ms": without, "with ms": with_}
    row["difference ms"] = statistics.median(differences)
    parts = {part: median_ms(seen[True], part) for part in OURS}
    sums = [sum(step[part] for part in OURS) / step["step"] for step in seen[True]]
    row["parts ms"], row["grammar ms"] = parts, sum(parts.values())
    row["grammar %"] = 100 * statistics.median(sums)
    row["core ms"] = {part: median_ms(seen[True], part) - median_ms(seen[False], part) for part in CORE}
    row["once a request ms"] = {part: statistics.median(clock.calls[part]) * 1e3 for part in ONCE if clock.calls[part]}
    return row


def show(row: dict[str, Any]) -> None:
    """Print what a batch came to."""
    step = row["with ms"]
    print(f"batch {row['batch']}: a step {row['without ms']:.2f} ms without, {step:.2f} ms with ({row['steps']} steps)")
    print(f"  difference of the medians, by round: {row['difference ms']:+.2f} ms")
    for part, cost in [*row["parts ms"].items(), *row["core ms"].items()]:
        print(f"  {part:20} {cost:8.3f} ms  {100 * cost / step:5.2f} %")
    for part, cost in row["once a request ms"].items():
        print(f"  {part:20} {cost:8.3f} ms  once a request")
    verdict = "within" if row["grammar %"] <= GOAL else "above"
    print(
        f"  {'the constraint':20} {row['grammar ms']:8.3f} ms  {row['grammar %']:5.2f} %, {verdict} {GOAL} %",
        flush=True,
    )


def once_a_request(engine: unspool.Engine) -> dict[str, Any]:
    """Time what does not come with every step: compiling, first and cached, and a mask by itself."""
    vocabulary, compiling, masks = vocabulary_of(engine.tokenizer), [], []
    of_tokenizer = time.perf_counter()
    ENGINE.compile(Schema('{"type": "null"}', compact=True), vocabulary)
    of_tokenizer = time.perf_counter() - of_tokenizer
    for number in range(9):
        language = Schema(json.dumps({**PROPERTIES, "title": f"number {number}"}), compact=True)
        start = time.perf_counter()
        compiled = ENGINE.compile(language, vocabulary)
        compiling.append(time.perf_counter() - start)
    start = time.perf_counter()
    ENGINE.compile(language, vocabulary)
    cached = time.perf_counter() - start
    position = compiled.start()
    text = '{"id":17,"name":"Ada Lovelace","email":"ada@example.org","born":"1815-12-10","height":1.6,"level":"gold"}'
    for token in engine.tokenizer.encode(text, add_special_tokens=False):
        start = time.perf_counter()
        Guidance.masks(ENGINE, [position])
        masks.append(time.perf_counter() - start)
        after = position.advance(token)
        assert after is not None
        position = after
    return {
        "tokenizer ms": of_tokenizer * 1e3,
        "compile ms": statistics.median(compiling) * 1e3,
        "cached compile us": cached * 1e6,
        "mask us": statistics.median(masks) * 1e6,
        "slowest mask us": max(masks) * 1e6,
        "masks": len(masks),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32])
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="count CPU time of the loop's thread; torch has one thread")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("UNSPOOL_TEST_DATA", "../shared/data")))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print(versions(), "load", os.getloadavg())
    threads = 1 if options.cpu else None
    with unspool.Engine.load("smollm2", dtype=options.dtype, device=options.device, threads=threads) as engine:
        rows = [{"dtype": options.dtype, **once_a_request(engine)}]
        print(json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in rows[0].items()}))
        clock = Clock(time.thread_time if options.cpu else time.perf_counter)
        for part, (owner, name) in {**OURS, **ONCE, **CORE}.items():
            clock.watch(part, owner, name)
        steps = Steps(clock)
        for batch in options.batches:
            rows.append({"dtype": options.dtype, **measure(engine, clock, steps, batch, options)})
            show(rows[-1])
    write(options.json, rows)


if __name__ == "__main__":
    main()
