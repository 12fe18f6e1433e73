"""The loop's own cost a step for every strategy, with a runner that computes nothing: all but the forward.

    python benchmarks/loop_cost.py [--rows 1,32,256] [--vocabulary 49152] [--repeats 3] [--only NAME;...]

CPU time of the loop's thread, on one thread, with the kernel if it was built; medians of a step. Rows are branches: a
beam of 4 has 4 to a request. The logits are noise as wide as the vocabulary; with `--vocabulary 8` reductions over it
cost next to nothing, and what is left is bookkeeping. `--profile` prints where one strategy spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch
from figures import versions, write

from unspool.huggingface import kernel
from unspool.loop import Loop
from unspool.pipeline import Pipeline, PluginSpec, build_pipeline
from unspool.registry import Registry
from unspool.request import Limits, PreparedRequest
from unspool.runner import Batch, Output
from unspool.text import Detokenizer

NEW = 40
SHIFTS = 16
PIPELINES: dict[str, tuple[int, str, dict[str, object], list[tuple[str, dict[str, object]]]]] = {
    "greedy": (1, "greedy", {}, []),
    "sample": (1, "sample", {}, []),
    "sample, temperature, top-k, top-p": (
        1,
        "sample",
        {},
        [("temperature", {"temperature": 0.7}), ("top_k", {"k": 50}), ("top_p", {"p": 0.9})],
    ),
    "sample, min-p": (1, "sample", {}, [("min_p", {"p": 0.05})]),
    "mirostat": (1, "sample", {}, [("mirostat", {})]),
    "greedy, repetition penalty": (1, "greedy", {}, [("repetition_penalty", {"penalty": 1.1})]),
    "greedy, no n-gram twice": (1, "greedy", {}, [("no_repeat_ngram", {"n": 3})]),
    "beam of 4": (4, "beam", {"width": 4}, []),
    "diverse beams, 4 in 2": (4, "diverse_beam", {"width": 4, "groups": 2}, []),
    "greedy, prompt lookup": (1, "greedy", {}, [("prompt_lookup", {})]),
}
"""Name -> rows of a request, strategy, its parameters, the other plugins."""


class Nothing:
    """A runner that computes nothing.

    Args:
        vocab_size: the width of its logits.
        rows: most that it is asked for in a step.
    """

    window, width, layers, digest = None, 1, 1, "nothing"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocab_size: int, rows: int) -> None:
        self.vocab_size = vocab_size
        self._logits = 3 * torch.randn(rows + SHIFTS, vocab_size, generator=torch.Generator().manual_seed(0))
        self._step = 0
        self.spent = 0.0
        """CPU seconds that its passes took."""

    def slot_bytes(self) -> int:
        """Take no memory."""
        return 1

    def free_bytes(self) -> int:
        """Have enough."""
        return 1 << 30

    def allocate(self, slots: int) -> None:
        """Allocate nothing."""

    def forward(self, batch: Batch) -> Output:
        """Give noise, whatever is asked."""
        start = time.thread_time()
        self._step = (self._step + 1) % SHIFTS
        output = Output(self._logits[self._step : self._step + len(batch.wanted)].clone())
        self.spent += time.thread_time() - start
        return output

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give what came."""
        return hidden


def microseconds_a_step(rows: int, vocabulary: int, wide: int, pipeline: Pipeline) -> float:
    """Decode in so many rows and give the median step's CPU time on the loop's thread, less its pass's."""
    runner = Nothing(vocabulary, 2 * rows + 64)
    loop = Loop(runner, 1 << 18, token_budget=1 << 18, max_running=rows)
    chance = torch.Generator().manual_seed(1)
    for i in range(max(1, rows // wide)):
        prompt = torch.randint(vocabulary, (19 + i % 7,), generator=chance).tolist()
        limits = Limits(max_new_tokens=NEW, min_new_tokens=NEW)
        loop.submit(PreparedRequest(str(i), tuple(prompt), pipeline, pipeline.parameters, limits, seed=i))
    loop.step()
    steps = []
    while loop.busy:
        start, before = time.thread_time(), runner.spent
        loop.step()
        steps.append(time.thread_time() - start - (runner.spent - before))
    return statistics.median(steps[2:-2]) * 1e6


def microseconds_a_token(new: int = 2000) -> float:
    """Detokenize real tokens one by one."""
    from transformers import AutoTokenizer

    from unspool.huggingface.load import local_folder

    tokenizer = AutoTokenizer.from_pretrained(local_folder("smollm2"))
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, naïvely — 速い狐. " * 60)[:new]
    detokenizer = Detokenizer(tokenizer)
    state = detokenizer.start([1])
    start = time.thread_time()
    for token in ids:
        state, _ = detokenizer.push(state, token)
    return (time.thread_time() - start) / len(ids) * 1e6


def main() -> None:
    """Print a table: microseconds a step, a row for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="names of strategies")
    parser.add_argument("--profile", help="the name of one strategy")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    registry, counts = Registry.installed(), [int(rows) for rows in options.rows.split(",")]
    made = {
        name: (wide, build_pipeline(PluginSpec(strategy, settings), [PluginSpec(*spec) for spec in others], registry))
        for name, (wide, strategy, settings, others) in PIPELINES.items()
    }
    if options.profile:
        wide, pipeline = made[options.profile]
        with cProfile.Profile() as profile:
            microseconds_a_step(counts[0], options.vocabulary, wide, pipeline)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    print(versions(), "with the kernel" if kernel.available() else "without the kernel")
    print(f"| microseconds a step, vocabulary of {options.vocabulary} |", *(f"{rows} rows |" for rows in counts))
    print("|---|" + "---|" * len(counts))
    found = []
    for name in options.only.split(";") if options.only else made:
        wide, pipeline = made[name]
        for rows in counts:
            costs = [microseconds_a_step(rows, options.vocabulary, wide, pipeline) for _ in range(options.repeats)]
            found.append({"strategy": name, "rows": rows, "microseconds": statistics.median(costs)})
        print(f"| {name} |", *(f"{entry['microseconds']:.0f} |" for entry in found[-len(counts) :]), flush=True)
    print(f"\ndetokenizing: {microseconds_a_token():.1f} us a token")
    write(options.json, found)


if __name__ == "__main__":
    main()
