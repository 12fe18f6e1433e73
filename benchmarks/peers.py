"""Unspool beside other engines, in one run: each is installed apart, and all take turns at the same jobs.

    python benchmarks/peers.py [--engines unspool,vllm,...] [--jobs batch-1,batch-32,...] [--dtypes bfloat16,float32]
                               [--unspool key=value[,key=value]]... [--repeats 5] [--new 128] [--json OUT] [--write]

SmolLM2-135M-Instruct, greedy, ends ignored. Each engine is installed into an environment of its own under `.peers`
(`benchmarks/peers/*.txt`) and runs in a process of its own that loads the model once (`benchmarks/peers/*_server.py`).
In a round each does the job once while the others wait; every round has prompts of its own, the same for all, of random
tokens. A job before, of a few tokens, is not counted. Figures are medians over the rounds, with the lowest and the
highest; a ratio is that of two sides in one round. Each `--unspool` adds a side with those arguments of `Engine.load`.
Before the jobs all continue one sentence, and whether they say the same is told.

What cannot be installed, loaded or done is said beside the table, with the reason; logs are in `.peers/logs`. vLLM and
Unspool need torch's CPU build where there is no GPU; set up pip so that it finds it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import machine, marked
from peers.arguments import count, names_of, settings_of
from peers.protocol import Job
from peers.sides import ENGINES, Failed, Side
from peers.turns import Outcome, random_prompts, take_turns, told
from peers.weights import SIZES, folder

OURS = "unspool"
USUAL = ["unspool", "transformers", "transformers-continuous", "vllm", "llama_cpp"]
SHARING, PREFIX, TAIL = 64, 1000, 16
"""Requests with one prefix, its length, and that of what each has of its own."""
SENTENCE, SAID = "The capital of France is", 24
"""What all continue at first, and by how many tokens."""


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    Args:
        says: its name in the table.
        lengths: of the prompts.
        width: beams.
        new: tokens a prompt gets; None: what `--new` says.
        shared: tokens with which all prompts begin.
        needs: what an engine must offer.
        rounds: most rounds.
    """

    says: str
    lengths: tuple[int, ...]
    width: int = 1
    new: int | None = None
    shared: int = 0
    needs: str = "greedy"
    rounds: int = 100

    def job(self, number: int, new: int) -> Job:
        """Make the job of a round."""
        seed = number + 100 * len(self.lengths) + 10_000 * self.width  # no prompt twice: ours would be kept
        prompts = random_prompts(self.lengths, seed)
        common = random_prompts([self.shared], number + 1000)[0]
        return Job([common + prompt for prompt in prompts], self.new or new, self.width)

    @property
    def timed(self) -> bool:
        """Tell whether seconds count, not tokens a second."""
        return self.needs == "sharing"


def _ragged(count: int) -> tuple[int, ...]:
    """Give lengths from 16 to 256."""
    return tuple(16 + 240 * i // (count - 1) for i in range(count))


KINDS = {
    "batch-1": Kind("1 prompt", (128,)),
    "batch-8": Kind("8 ragged prompts", _ragged(8)),
    "batch-32": Kind("32 ragged prompts", _ragged(32)),
    **{
        f"beam-{width}x{batch}": Kind(f"{width} beams, batch {batch}", (128,) * batch, width, 32, needs="beam")
        for width in (4, 8)
        for batch in (1, 4)
    },
    "shared-prefix": Kind(
        f"first tokens, {SHARING} requests with one prefix", (TAIL,) * SHARING, 1, 1, PREFIX, "sharing", 2
    ),
    "no-prefix": Kind(
        f"first tokens, {SHARING} requests with nothing in common",
        (PREFIX + TAIL,) * SHARING,
        1,
        1,
        needs="sharing",
        rounds=2,
    ),
}


@dataclass(frozen=True)
class Cell:
    """What one side came to in one job.

    Args:
        figures: tokens a second of each round, or seconds.
        speeds: the same, so that more is quicker, by round.
        reason: why there are none, or fewer.
    """

    figures: list[float]
    speeds: Mapping[int, float]
    reason: str | None


def cell_of(kind: Kind, new: int, outcome: Outcome) -> Cell:
    """Turn a side's answers into figures."""
    seconds = {number: answer.seconds for number, answer in outcome.rounds.items()}
    tokens = len(kind.lengths) * (kind.new or new)
    speeds = {number: tokens / each for number, each in seconds.items()}
    return Cell(list(seconds.values() if kind.timed else speeds.values()), speeds, outcome.reason)


def measure(
    options: argparse.Namespace, versions: dict[str, dict[str, str]], said: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """Let all sides take turns at all jobs, one dtype after another.

    Args:
        options: of the command line.
        versions: of each side's packages, which are added.
        said: what each side says at first, by dtype, which is added.
    """
    settings: list[tuple[str, dict[str, Any]]] = []
    for engine in options.engines:
        settings.append((engine, {}))
        if engine == OURS:
            settings += [(engine, given) for given in options.unspool]
    rounds = {name: min(options.repeats, KINDS[name].rounds) for name in options.jobs}
    turns = len(options.dtypes) * len(settings) * sum(number + 1 for number in rounds.values())
    rows = []
    with told(turns) as progress:
        for dtype in options.dtypes:
            with ExitStack() as stack:
                sides = [Side(engine, dtype, options.threads, given, options.limit) for engine, given in settings]
                for side in sides:
                    stack.callback(side.close)
                said[dtype] = continued(sides)
                for name, number in rounds.items():
                    kind = KINDS[name]

                    def job_of(round_: int, kind: Kind = kind) -> Job:
                        return kind.job(round_, options.new)

                    where = f"{dtype} {name}"
                    outcomes = take_turns(
                        sides, job_of, number, kind.needs, lambda who, where=where: progress(f"{where} {who}")
                    )
                    cells = {side: cell_of(kind, options.new, outcome) for side, outcome in outcomes.items()}
                    rows += rows_of(dtype, name, cells)
                for side in sides:
                    versions[side.name] = side.versions or versions.get(side.name, {})
    return rows


def continued(sides: Sequence[Side]) -> dict[str, str]:
    """Have all sides continue a sentence: what each says, by name. What is not loaded yet is loaded by that."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    job, said = Job([tokenizer.encode(SENTENCE)], SAID, show=True), {}
    for side in sides:
        with suppress(Failed):  # the jobs tell why
            answer = side.run(job)
            assert answer.token_ids is not None
            said[side.name] = tokenizer.decode(answer.token_ids[0])
    return said


def rows_of(dtype: str, name: str, cells: Mapping[str, Cell]) -> Iterator[dict[str, Any]]:
    """Sum up a job: a row a side, with the ratios of all our sides to it."""
    ours = [side for side in cells if side.split()[0] == OURS]
    for side, cell in cells.items():
        ratios = {}
        for own in ours:
            pairs = [(cells[own].speeds[n], speed) for n, speed in cell.speeds.items() if n in cells[own].speeds]
            if own != side and pairs:
                ratios[own] = _spread([a / b for a, b in pairs])
        yield {
            "dtype": dtype,
            "job": name,
            "side": side,
            "unit": "s" if KINDS[name].timed else "tok/s",
            "figure": _spread(cell.figures) if cell.figures else None,
            "rounds": cell.figures,
            "ratios": ratios,
            "not run": cell.reason,
        }


def _spread(values: Sequence[float]) -> list[float]:
    """Give the median, the lowest and the highest."""
    return [statistics.median(values), min(values), max(values)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as a Markdown table, and below it what was not run."""
    ours = list(dict.fromkeys(own for row in rows for own in row["ratios"]))
    lines = ["| dtype | job | engine | median (lowest to highest) |" + "".join(f" {own} / it |" for own in ours)]
    lines.append("|---" * (4 + len(ours)) + "|")
    for row in rows:
        if row["figure"]:
            middle, low, high = row["figure"]
            figure = f"{_short(middle)} {row['unit']} ({_short(low)} to {_short(high)})"
            ratios = [row["ratios"].get(own) for own in ours]
            said = ["{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else "" for ratio in ratios]
            lines.append("| " + " | ".join([row["dtype"], KINDS[row["job"]].says, row["side"], figure, *said]) + " |")
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row["not run"] and row["not run"] != "cannot do it":
            missing.setdefault(f"{row['side']}: {row['not run']}", []).append(f"{row['dtype']} {row['job']}")
    return "\n".join([*lines, "", *(f"- Not run to the end: {said} ({', '.join(at)})" for said, at in missing.items())])


def agreement(said: Mapping[str, Mapping[str, str]]) -> str:
    """Tell for each dtype who says what in the beginning."""
    lines = []
    for dtype, texts in said.items():
        speakers: dict[str, list[str]] = {}
        for side, text in texts.items():
            speakers.setdefault(text, []).append(side)
        ways = "; ".join(f"{', '.join(sides)}: {text!r}" for text, sides in speakers.items())
        lines.append(f"- {SAID} tokens after {SENTENCE!r} in {dtype}: {ways}")
    return "\n".join(lines)


def packages(versions: Mapping[str, Mapping[str, str]]) -> str:
    """Tell what runs, and in which versions; sides that run the same together."""
    sides: dict[str, list[str]] = {}
    for side, own in versions.items():
        if own:
            sides.setdefault(", ".join(f"{name} {version}" for name, version in own.items()), []).append(side)
    ran = "; ".join(f"{', '.join(names)}: {own}" for own, names in sides.items())
    return f"- Python {platform.python_version()}; {ran}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=names_of(list(ENGINES)), default=USUAL, help=", ".join(ENGINES))
    parser.add_argument("--jobs", type=names_of(list(KINDS)), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--dtypes", type=names_of(list(SIZES)), default=["bfloat16", "float32"])
    parser.add_argument("--unspool", type=settings_of, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--new", type=count, default=128, help="new tokens, where the job leaves them open")
    parser.add_argument("--repeats", type=count, default=5, help="rounds; at most 2 of the jobs on prefixes")
    parser.add_argument("--threads", type=count, default=len(machine.cores()), help="of every engine")
    parser.add_argument("--limit", type=count, default=900, help="seconds that a turn may take")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help=f"write the table into {marked.PAGE.name}")
    options = parser.parse_args()
    if options.unspool and OURS not in options.engines:
        parser.error("--unspool needs unspool among --engines")
    if options.write:
        marked.check("peers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the engines' processes too
    command = shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]])
    about = machine.describe(options.threads, options.dtypes)
    versions: dict[str, dict[str, str]] = {}
    said: dict[str, dict[str, str]] = {}
    rows = measure(options, versions, said)
    text = f"`{command}`\n\n{machine.sentence(about)}.\n\n{table(rows)}\n{agreement(said)}\n{packages(versions)}"
    print(text)
    if options.json:
        figures = {"command": command, "machine": about, "versions": versions, "said": said, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.write:
        marked.fill("peers", text)


if __name__ == "__main__":
    main()
