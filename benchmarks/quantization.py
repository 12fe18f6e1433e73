"""What integer weights cost in log-probability, and what they save in time, on the real model.

    python benchmarks/quantization.py [--quantizations int8] [--dtype bfloat16] [--repeats 5] [--json OUT]

The log-probability of fixed texts (paragraphs of `docs/how-it-works.md`) with the weights as they are and quantized:
the mean a token, how far a token's moves, and how often the likeliest token is the same. Speed is greedy decoding of
128 tokens after a prompt of 128, in turn, each side in a process of its own, medians. What of each side is compiled is
told: run `unspool compile smollm2 --dtype bfloat16` before, with and without `--quantization int8`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from figures import versions, write
from throughput import VOCABULARY, prompts_of, time_unspool

import unspool

PAGE = Path(__file__).parents[1] / "docs" / "how-it-works.md"
NEW = 128


def texts() -> list[str]:
    """Give paragraphs of a page that is there on every machine."""
    return [part for part in PAGE.read_text(encoding="utf-8").split("\n\n") if 300 < len(part) < 900][:10]


class Side:
    """One kind of weights, in the process that it is loaded in."""

    engine: unspool.Engine

    @classmethod
    def load(cls, dtype: str, quantization: str | None) -> None:
        """Load it."""
        cls.engine = unspool.Engine.load("smollm2", dtype=dtype, quantization=quantization, prefix_cache=False)


def compiled() -> str:
    """Tell what of it is compiled."""
    runner: Any = Side.engine.runner
    return " ".join(runner.compiled) or "no"


def seconds(new: int) -> float:
    """Time a prompt and so many tokens after it."""
    return time_unspool(Side.engine, prompts_of(1, VOCABULARY), new)


def score() -> tuple[list[float], list[int]]:
    """Give the log-probability of every token of the texts, and the likeliest token at each place."""
    engine = Side.engine
    values: list[float] = []
    best: list[int] = []
    for text in texts():
        found = engine.score(text[:40], text[40:], top=1, raw=True)
        values += found.logprobs
        best += [top[0][0] for top in found.top]
    return values, best


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizations", default="int8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    sides = [None, *options.quantizations.split(",")]
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, Side.load, (options.dtype, side)) for side in sides]
    scores = [pool.submit(score).result() for pool in pools]
    for pool in pools:
        pool.submit(seconds, 8).result()
    rounds = [[NEW / pool.submit(seconds, NEW).result() for pool in pools] for _ in range(options.repeats)]
    print(versions())
    print("| weights | compiled | mean logprob | change | mean move | same likeliest | tok/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    exact, likeliest = scores[0]
    rows: list[dict[str, Any]] = []
    for at, (side, pool, (values, best)) in enumerate(zip(sides, pools, scores, strict=True)):
        rows.append(
            {
                "weights": side or options.dtype,
                "compiled": pool.submit(compiled).result(),
                "mean_logprob": round(statistics.fmean(values), 4),
                "change": round(statistics.fmean(values) - statistics.fmean(exact), 4),
                "mean_move": round(statistics.fmean(abs(a - b) for a, b in zip(values, exact, strict=True)), 4),
                "same_likeliest": round(statistics.fmean(a == b for a, b in zip(best, likeliest, strict=True)), 4),
                "tok_s": round(statistics.median(speeds[at] for speeds in rounds), 1),
                "ratio": round(statistics.median(speeds[at] / speeds[0] for speeds in rounds), 2),
            }
        )
        print("|", " | ".join(map(str, rows[-1].values())), "|", flush=True)
    write(options.json, rows)
    for pool in pools:  # left to the end of the interpreter, that ended once with "Bad file descriptor"
        pool.shutdown()


if __name__ == "__main__":
    main()
