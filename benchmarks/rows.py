"""What a strategy's step costs beside a greedy step of as many rows, on the real model, in turn.

    python benchmarks/rows.py [--dtype bfloat16] [--requests 1,4] [--repeats 5] [--compile auto] [--json OUT]

A strategy that runs several rows a request should cost what those rows cost and little more. Prompts of 128 random
tokens; the time of a step is that of a long run less that of a short one, over the steps between them, so prompts do
not count. Beside DoLa the output matrix is applied once more, to the rows of its candidate layers. Figures are medians
over the rounds; a ratio is that of two sides in one round. `unspool compile` before says what is measured; what was
compiled is told.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from figures import versions, write
from tqdm import tqdm

import unspool
from unspool.runner import Batch, Output

SHORT, LONG = 4, 100
LAYERS = [20, 22, 24, 26, 28]
SIDES: dict[str, tuple[int, Any, list[Any]]] = {
    "beam of 4": (4, {"beam": {"width": 4, "early_stopping": "never"}}, []),
    "contrastive search, k = 4": (4, {"contrastive_search": {"top_k": 4}}, []),
    "guidance": (2, "greedy", [{"guidance": 1.5}]),
    "DoLa": (1, "greedy", [{"dola": {"layers": LAYERS}}]),
    "sample, top-k, top-p": (1, {"sample": {}}, [{"top_k": 50}, {"top_p": 0.9}]),
    "repetition penalty": (1, "greedy", [{"repetition_penalty": 1.1}]),
}
"""Name -> rows of a request, strategy, plugins."""


def milliseconds(engine: unspool.Engine, count: int, seed: int, strategy: Any, plugins: list[Any]) -> float:
    """Time a step of so many requests."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(100, engine.runner.vocab_size, (count, 128), generator=generator).tolist()
    seconds, passes = [], []
    for new in (SHORT, LONG):
        requests = [
            unspool.Request(
                prompt=prompt, strategy=strategy, plugins=plugins, max_new_tokens=new, min_new_tokens=new, n=1
            )
            for prompt in prompts
        ]
        results = list(engine.run(requests))
        for result in results:
            if result.error is not None:
                raise result.error
        seconds.append(max(result.stats.total_s - result.stats.first_token_s for result in results))
        passes.append(max(result.stats.forward_passes for result in results))
    return (seconds[1] - seconds[0]) / (passes[1] - passes[0]) * 1e3


@contextmanager
def heads(runner: Any, rows: int) -> Iterator[None]:
    """Apply the output matrix to so many rows more after every pass."""
    forward, hidden = runner.forward, torch.randn(rows, runner.width).to(runner.dtype)

    def both(batch: Batch) -> Output:
        output: Output = forward(batch)
        runner.head(hidden)
        return output

    runner.forward = both
    try:
        yield
    finally:
        del runner.forward


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", default="1,4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", default="auto", choices=["off", "auto"])
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    engine = unspool.Engine.load("smollm2", dtype=options.dtype, compile=options.compile, prefix_cache=False)
    runner: Any = engine.runner
    counts = [int(count) for count in options.requests.split(",")]
    print(versions(), "compiled:", " ".join(runner.compiled) or "nothing")
    print("| strategy | requests | rows | ms a step | greedy, as many rows | ratio |")
    print("|---|---|---|---|---|---|")
    rows = []
    bar = tqdm(total=len(SIDES) * len(counts) * options.repeats, unit="turn", disable=None)
    for name, (wide, strategy, plugins) in SIDES.items():
        for count in counts:
            pairs = []
            for turn in range(options.repeats):
                own = milliseconds(engine, count, turn, strategy, plugins)
                with heads(runner, count * len(LAYERS)) if name == "DoLa" else nullcontext():
                    pairs.append((own, milliseconds(engine, count * wide, turn, "greedy", [])))
                bar.update()
            row = {
                "strategy": name,
                "requests": count,
                "rows": count * wide,
                "ms": round(statistics.median(own for own, _ in pairs), 2),
                "greedy_ms": round(statistics.median(greedy for _, greedy in pairs), 2),
                "ratio": round(statistics.median(own / greedy for own, greedy in pairs), 2),
            }
            rows.append(row)
            tqdm.write("| " + " | ".join(map(str, row.values())) + " |")
    bar.close()
    write(options.json, rows)


if __name__ == "__main__":
    main()
