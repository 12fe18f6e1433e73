"""What drafts gain or lose a step: in one run they are hung for some steps, left alone for as many, and so on.

    python benchmarks/turns.py [--dtype bfloat16] [--batches 1,8,32] [--drafters prompt_lookup,suffix] [--new 128]
                               [--block 8] [--rounds 3] [--data FOLDER] [--json OUT]

Prompts of Spec-Bench as `speculation.py` takes them, greedy; no text ends before `--new` tokens. Both sides of a pair
of blocks stand in one text, milliseconds apart, so a machine whose speed changes by a third from one minute to the next
hides less than where whole texts are timed. A pair counts where all requests decode throughout, and no block is in two
pairs. A ratio is that of tokens a second, drafting over resting; the figure is the median of the pairs, with a 95 %
interval by bootstrap. What is not seen: that a fixed batch ends with its slowest text.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import versions, write
from speculation import interval, prompts_of

import unspool
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_speculative.prompt_lookup import PromptLookup
from unspool_speculative.suffix import Suffix

DRAFTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt_lookup": (PromptLookup, {}),
    "suffix": (Suffix, {"remember": 0}),
}
"""The class of each, and its parameters: here nothing is remembered from one prompt to the next."""


class Clock:
    """Says whether it is the drafts' turn, and keeps what the steps of each block took and gave.

    Args:
        batch: requests that all have to decode.
        block: steps of a turn.
    """

    def __init__(self, batch: int, block: int) -> None:
        self.drafts = True
        self.blocks: list[tuple[bool, float, int, int]] = []
        """Of each turn: whose it was, seconds, tokens, steps."""
        self._batch, self._block = batch, block
        self._last: tuple[float, dict[str, int]] | None = None
        self._sum = (0.0, 0, 0)

    def step(self, step: Step) -> None:
        """Note that a step begins."""
        now, ids = time.perf_counter(), [request.id for request in step.requests]
        rows = zip(step.request.tolist(), step.length.tolist(), strict=True)
        lengths = {ids[request]: length for request, length in rows}
        if self._last is not None:
            before, shorter = self._last
            gained = [length - shorter.get(name, length) for name, length in lengths.items()]
            seconds, tokens, steps = self._sum
            if len(gained) == self._batch and all(gained):  # no prompt is still running
                self._sum = seconds + now - before, tokens + sum(gained), steps + 1
            else:
                self._sum = 0.0, 0, 0
        self._last = now, lengths
        if self._sum[2] == self._block:
            self.blocks.append((self.drafts, *self._sum))
            self.drafts, self._sum = not self.drafts, (0.0, 0, 0)

    def pairs(self) -> list[tuple[float, float]]:
        """Give the tokens a second of each two turns that follow each other, the drafts' first."""
        speeds = [tokens / seconds for _, seconds, tokens, _ in self.blocks]
        return list(zip(speeds[::2], speeds[1::2], strict=False))


def in_turns(name: str, clock: Clock) -> Plugin:
    """Make a drafter that hangs something only when it is the drafts' turn."""
    drafter, params = DRAFTERS[name]

    class InTurns(drafter):  # type: ignore[misc]
        @hookimpl
        def pre_forward(self, step: Step) -> None:
            clock.step(step)
            if clock.drafts:
                super().pre_forward(step)

    made: Plugin = InTurns(drafter.Params(**params))
    return made


def measure(engine: unspool.Engine, name: str, prompts: Sequence[str], options: argparse.Namespace) -> Clock:
    """Decode a batch, and give what its blocks took."""
    clock = Clock(len(prompts), options.block)
    plugins: Any = [in_turns(name, clock)]
    requests = [
        unspool.Request(prompt=prompt, strategy="greedy", plugins=plugins, max_new_tokens=options.new, ignore_eos=True)
        for prompt in prompts
    ]
    for _ in engine.run(requests):
        pass
    return clock


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--drafters", type=lambda text: text.split(","), default=list(DRAFTERS))
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--block", type=int, default=8, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="batches of each size; of one request four times")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("UNSPOOL_TEST_DATA", "../shared/data")))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print(versions())
    print("| batch | drafter | pairs | tokens a row, drafting | ms, drafting | resting | tok/s, drafting / resting |")
    print("|---|---|---|---|---|---|---|")
    table = []
    for batch in options.batches:
        engine = unspool.Engine.load("smollm2", dtype=options.dtype, max_running=batch)
        rounds = options.rounds * (4 if batch == 1 else 1)
        prompts = prompts_of(options.data, batch * rounds)
        for name in options.drafters:
            measure(engine, name, prompts[:batch], options)
            starts = range(0, len(prompts) - batch + 1, batch)
            clocks = [measure(engine, name, prompts[start : start + batch], options) for start in starts]
            ratios = [ours / theirs for clock in clocks for ours, theirs in clock.pairs()]
            if not ratios:
                parser.error(
                    f"all {batch} requests never decode for two turns of {options.block} steps: take more --new"
                )
            blocks = [block for clock in clocks for block in clock.blocks]
            sides = {drafts: [block for block in blocks if block[0] == drafts] for drafts in (True, False)}
            ms = {drafts: sum(b[1] for b in own) / sum(b[3] for b in own) * 1e3 for drafts, own in sides.items()}
            tokens = sum(b[2] for b in sides[True]) / sum(b[3] for b in sides[True]) / batch
            row = {"batch": batch, "drafter": name, "pairs": len(ratios), "tokens": round(tokens, 3)}
            row |= {"ms drafting": round(ms[True], 2), "ms resting": round(ms[False], 2)}
            table.append({**row, "ratio": [round(value, 3) for value in interval(ratios)]})
            middle, low, high = table[-1]["ratio"]
            print("| " + " | ".join(map(str, row.values())) + f" | {middle} [{low}, {high}] |", flush=True)
        engine.close()
    write(options.json, table)


if __name__ == "__main__":
    main()
