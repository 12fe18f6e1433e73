"""How speed and memory change with the batch, the context, the beams and the drafts: one at a time, and a plot of each.

    python benchmarks/curves.py [--dtypes float32,bfloat16] [--axes batch,context,width,drafts] [--quick] [--repeats 3]
                                [--new 32] [--unspool key=value[,key=value]] [--json OUT] [--plot FOLDER] [--write]

SmolLM2-135M-Instruct, Unspool and, but for drafts, transformers: each in a process of its own with the model loaded, in
turn, ends ignored, random prompts. Figures are medians of the rounds.

- batch: decode steps only, from the moment that every prompt has its first token; prompts of 64 tokens.
- context: the same of one prompt, by its length.
- width: beam search of one prompt of 128 tokens, which is counted; `new` tokens.
- drafts: decode steps of one prompt that repeats itself, by the length of `prompt_lookup`'s drafts, all of them run.

KV is what keys and values take at most: ours are slots taken at once (no prompts are kept), theirs the cache that
`generate` returns. The limit is what a step of that batch can reach at best: it reads all weights (in their dtype;
compiled bfloat16 ones are kept in three quarters of it), keys and values once at the measured bandwidth of the memory,
and computes at the measured speed of a large product.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import environments, machine, marked
from peers.arguments import count, names_of, settings_of
from peers.protocol import Answer, Job
from peers.sides import Side
from peers.turns import random_prompts, take_turns, told
from peers.weights import SIZES, Costs

PROMPT = 64
"""Tokens of a prompt on the axis of batches."""
ONE_PASS = 1 << 14
"""Our most tokens of a pass: all prompts run in one, so that steps after it are decode steps alone."""


@dataclass(frozen=True)
class Axis:
    """What is varied.

    Args:
        points: its values.
        quick: those of a short run.
        job: makes the job at a value, of so many new tokens, in a round.
        needs: what a side must offer.
        decode: whether only decode steps count.
    """

    points: tuple[int, ...]
    quick: tuple[int, ...]
    job: Callable[[int, int, int], Job]
    needs: str = "greedy"
    decode: bool = True


def _repeating(drafts: int, new: int, seed: int) -> Job:
    """Make a prompt that says the same again and again."""
    return Job([random_prompts([16], seed)[0] * 8], new, drafts=drafts)


AXES = {
    "batch": Axis(
        (1, 2, 4, 8, 16, 32, 64),
        (1, 8, 32),
        lambda batch, new, seed: Job(random_prompts([PROMPT] * batch, seed), new),
    ),
    "context": Axis(
        (128, 256, 512, 1024, 2048, 4096),
        (128, 1024),
        lambda length, new, seed: Job(random_prompts([length], seed), new),
    ),
    "width": Axis(
        (1, 2, 4, 8, 16),
        (1, 4, 8),
        lambda width, new, seed: Job(random_prompts([128], 100 * width + seed), new, width=width),
        needs="beam",
        decode=False,
    ),
    "drafts": Axis((0, 1, 2, 4, 8, 16), (0, 4, 16), _repeating, needs="drafts"),
}


def speed(answer: Answer, job: Job, decode: bool) -> float:
    """Give tokens a second, of decode steps alone or of all."""
    if decode and answer.first is not None:
        return len(job.prompts) * (job.new - 1) / (answer.seconds - answer.first)
    return len(job.prompts) * job.new / answer.seconds


def measure(options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Take all turns at all points, one dtype after another."""
    axes = {name: (AXES[name], AXES[name].quick if options.quick else AXES[name].points) for name in options.axes}
    turns = 2 * (options.repeats + 1) * len(options.dtypes) * sum(len(points) for _, points in axes.values())
    costs, rows = Costs.of_model(), []
    with told(turns) as progress:
        for dtype in options.dtypes:
            with ExitStack() as stack:
                settings = {"token_budget": ONE_PASS, "prefix_cache": False, **options.unspool}
                sides = [
                    Side("unspool", dtype, options.threads, settings),
                    Side("transformers", dtype, options.threads),
                ]
                for side in sides:
                    stack.callback(side.close)
                for name, (axis, points) in axes.items():
                    for point in points:
                        rows += _rows(name, axis, point, sides, options, progress)
                        for row in rows[-2:]:
                            row["dtype"] = dtype
                            if name == "batch":
                                middle = PROMPT + options.new // 2
                                peak = about["peak"][dtype]
                                row["limit"] = costs.tokens_a_second(point, middle, dtype, about["bandwidth"], peak)
    return [row for row in rows if row["speed"] is not None or row["reason"] != "cannot do it"]


def _rows(
    name: str,
    axis: Axis,
    point: int,
    sides: Sequence[Side],
    options: argparse.Namespace,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Take the turns of one point: a row a side."""

    def job_of(number: int) -> Job:
        return axis.job(point, options.new, number)

    outcomes = take_turns(sides, job_of, options.repeats, axis.needs, lambda who: progress(f"{name} {point} {who}"))
    rows = []
    for side in sides:
        outcome = outcomes[side.name]
        answers = list(outcome.rounds.values())
        speeds = [speed(answer, job_of(number), axis.decode) for number, answer in outcome.rounds.items()]
        kept = [answer.kv_bytes for answer in answers if answer.kv_bytes is not None]
        passes = [answer.passes for answer in answers if answer.passes is not None]
        rows.append(
            {
                "axis": name,
                "at": point,
                "side": side.name.split()[0],
                "speed": statistics.median(speeds) if speeds else None,
                "speeds": speeds,
                "kv": max(kept) if kept else None,
                "a pass": options.new / statistics.median(passes) if passes and name == "drafts" else None,
                "reason": outcome.reason,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    lines = ["| dtype | axis | at | engine | tok/s | limit | KV MB | tokens a pass |", "|---" * 8 + "|"]
    for row in rows:
        if row["speed"] is None:
            said = [f"not run: {row['reason']}", "", "", ""]
        else:
            figures = (row["speed"], row.get("limit"), row["kv"] and row["kv"] / 1e6, row["a pass"])
            said = ["" if figure is None else f"{figure:.1f}" for figure in figures]
        lines.append("| " + " | ".join([row["dtype"], row["axis"], str(row["at"]), row["side"], *said]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=names_of(list(SIZES)), default=["float32", "bfloat16"])
    parser.add_argument("--axes", type=names_of(list(AXES)), default=list(AXES), help=", ".join(AXES))
    parser.add_argument("--quick", action="store_true", help="few points, float32, one round of 16 new tokens")
    parser.add_argument("--repeats", type=count, default=3, help="rounds")
    parser.add_argument("--new", type=count, default=32, help="new tokens, from 2 on")
    parser.add_argument("--threads", type=count, default=len(machine.cores()), help="of both")
    parser.add_argument("--unspool", type=settings_of, default={}, metavar="KEY=VALUE", help="for Engine.load")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the curves there, as SVG")
    parser.add_argument(
        "--write", action="store_true", help=f"write the table into {marked.PAGE.name}, and draw for it"
    )
    options = parser.parse_args()
    if options.quick:
        options.dtypes, options.repeats, options.new = ["float32"], 1, 16
    if options.new < 2:
        parser.error("--new: a decode step is after the first token, so 2 is the least")
    if options.write:
        marked.check("curves")
        options.plot = options.plot or marked.PLOTS
    command = shlex.join(["python", "benchmarks/curves.py", *sys.argv[1:]])
    about = machine.describe(options.threads, options.dtypes)
    rows = measure(options, about)
    text = f"`{command}`\n\n{machine.sentence(about)}.\n\n{table(rows)}"
    print(text)
    figures = json.dumps({"command": command, "machine": about, "rows": rows}, indent=2)
    if options.json:
        options.json.write_text(figures + "\n", encoding="utf-8")
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
        drawing = [str(environments.python_of("plots")), str(Path(__file__).with_name("plots.py")), str(options.plot)]
        subprocess.run(drawing, input=figures, text=True, check=True)
    if options.write:
        pictures = "\n".join(f"![{name}](images/curves-{name}.svg)" for name in options.dtypes)
        marked.fill("curves", f"{text}\n\n{pictures}")


if __name__ == "__main__":
    main()
