"""The loop's own cost a step, with a runner that does nothing: everything but the forward and the vocabulary.

    python benchmarks/loop_cost.py [--rows 256]

The vocabulary has eight tokens, so that reductions over it cost next to nothing. Detokenizing is measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from unspool.loop import Loop
from unspool.pipeline import Pipeline, PluginSpec, build_pipeline
from unspool.registry import Registry
from unspool.request import Limits, PreparedRequest
from unspool.runner import Batch, Output
from unspool.text import Detokenizer


class Nothing:
    """A runner that computes nothing."""

    vocab_size, window, width, layers, digest = 8, None, 1, 1, "nothing"
    device, dtype = torch.device("cpu"), torch.float32

    def slot_bytes(self) -> int:
        """Take no memory."""
        return 1

    def free_bytes(self) -> int:
        """Have enough."""
        return 1 << 30

    def allocate(self, slots: int) -> None:
        """Allocate nothing."""

    def forward(self, batch: Batch) -> Output:
        """Give the same logits for every row."""
        return Output(torch.arange(8.0).repeat(len(batch.wanted), 1))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give what came."""
        return hidden


def milliseconds_a_step(rows: int, new: int, pipeline: Pipeline) -> float:
    """Decode `rows` requests of `new` tokens and give the median step's CPU time on the loop's thread."""
    loop = Loop(Nothing(), 1 << 18, token_budget=1 << 18, max_running=rows)
    for i in range(rows):
        limits = Limits(max_new_tokens=new)
        loop.submit(PreparedRequest(str(i), tuple(range(1, 20 + i % 7)), pipeline, pipeline.parameters, limits))
    loop.step()
    steps = []
    while loop.busy:
        start = time.thread_time()
        loop.step()
        steps.append(time.thread_time() - start)
    return statistics.median(steps) * 1e3


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
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = build_pipeline(PluginSpec("greedy"), [], Registry.installed())
    costs = [milliseconds_a_step(options.rows, 128, pipeline) for _ in range(options.repeats)]
    middle, spread = statistics.median(costs), f"{min(costs):.2f} to {max(costs):.2f}"
    print(f"loop: {middle:.2f} ms a step of {options.rows} greedy rows ({spread})")
    print(f"detokenizing: {microseconds_a_token():.1f} us a token")


if __name__ == "__main__":
    main()
