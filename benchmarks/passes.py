"""How near passes come to the time of their matrix products alone, on the real model, in turn.

    python benchmarks/passes.py [--dtype bfloat16] [--rows 1,2,4,8,16,32,64] [--prompts 128,256,512] [--context 215]
                                [--repeats 15] [--compile auto] [--json OUT]

A pass is one call of the runner: steps of so many rows, each after so many tokens of its own, and prompts of which the
last token's logits are wanted, one or several together. The products are all of the model's linear layers on as many
random rows, one after another, those of one input joined: by torch as they are, and laid out for oneDNN in each dtype
in which the processor multiplies; the quickest of these counts. Figures are medians; a share is the products' time over
the pass's. `unspool compile` before says what is measured; what was compiled is told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from figures import versions, write
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from unspool.huggingface.load import load, local_folder
from unspool.huggingface.projections import Packed, Part, can_pack, join
from unspool.runner import Batch, Span

SHORT, FULL = 136, 512
"""What 32 ragged prompts of 16 to 256 tokens are on average, and the tokens of one of their passes."""


def step(rows: int, context: int, vocab: int) -> Batch:
    """Make a step: every row has a context of its own, in one piece."""
    starts = np.arange(rows) * context
    spans = [Span(row, 1, slice(start, start + context)) for row, start in enumerate(starts.tolist())]
    tokens = np.random.default_rng(rows).integers(100, vocab, rows)
    return Batch(tokens, np.full(rows, context - 1), starts + context - 1, spans, np.arange(rows))


def prompt(length: int, vocab: int) -> Batch:
    """Make a whole prompt, whose last token is wanted."""
    places = np.arange(length)
    tokens = np.random.default_rng(length).integers(100, vocab, length)
    return Batch(tokens, places, places, [Span(0, length, slice(0, length))], places[-1:])


def prompts(total: int, length: int, vocab: int) -> Batch:
    """Make as many prompts of a length as fill a pass, the last of them cut short. The last token of each is wanted."""
    places = np.arange(total)
    starts = range(0, total, length)
    spans = [Span(start, min(length, total - start), slice(start, min(start + length, total))) for start in starts]
    tokens = np.random.default_rng(total).integers(100, vocab, total)
    return Batch(tokens, places % length, places, spans, np.array([span.context.stop - 1 for span in spans]))


@torch.no_grad()
def ways(dtype: torch.dtype) -> list[Sequence[Any]]:
    """Give all linear layers of the model, in order, the output matrix last: in each way in which they can multiply."""
    model = AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=dtype).eval()
    join(model)
    found: dict[int, Any] = {}
    for module in model.modules():
        linear = module.joint.project if isinstance(module, Part) else module
        if type(linear) is nn.Linear:
            found[id(linear)] = linear
    linears = list(found.values())
    packs = [each for each in dict.fromkeys([dtype, torch.float32]) if can_pack(each)]
    return [linears, *([Packed(linear, each) for linear in linears] for each in packs)]


def products(linears: Sequence[Any], rows: int, wanted: int, dtype: torch.dtype) -> Callable[[], None]:
    """Give a function that runs them."""
    *within, head = linears
    inputs = {width: torch.randn(rows, width).to(dtype) for width in {linear.in_features for linear in linears}}
    last = torch.randn(wanted, head.in_features).to(dtype)

    def run() -> None:
        for linear in within:
            linear(inputs[linear.in_features])
        head(last)

    return run


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--prompts", default="128,256,512")
    parser.add_argument("--context", type=int, default=215)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", default="auto", choices=["off", "auto"])
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    rows, lengths = ([int(n) for n in given.split(",") if n] for given in (options.rows, options.prompts))
    dtype = getattr(torch, options.dtype)
    runner = load("smollm2", dtype=options.dtype, compile=options.compile).runner  # on this thread, as the products are
    runner.allocate(max([options.context * max(rows, default=0), FULL, *lengths]))
    batches = [
        *((f"{n} rows", step(n, options.context, runner.vocab_size)) for n in rows),
        *((f"a prompt of {n}", prompt(n, runner.vocab_size)) for n in lengths),
        (f"prompts of {SHORT}, {FULL} in all", prompts(FULL, SHORT, runner.vocab_size)),
    ]
    linears = ways(dtype)
    print(versions(), "compiled:", " ".join(runner.compiled) or "nothing")
    print("| pass | ms | products alone, ms | share |")
    print("|---|---|---|---|")
    table = []
    for name, batch in tqdm(batches, unit="size", disable=None):
        sides = [products(each, len(batch.token_ids), len(batch.wanted), dtype) for each in linears]
        runs = [lambda batch=batch: runner.forward(batch), *sides]
        rounds = [[milliseconds(run) for run in runs] for _ in range(options.repeats + 1)][1:]
        own, *alone = (statistics.median(taken) for taken in zip(*rounds, strict=True))
        row = {"pass": name, "ms": round(own, 2), "products_ms": round(min(alone), 2)}
        table.append({**row, "share": round(min(alone) / own, 2), "ways_ms": [round(each, 2) for each in alone]})
        tqdm.write("| " + " | ".join(map(str, [*row.values(), table[-1]["share"]])) + " |")
    write(options.json, table)


if __name__ == "__main__":
    main()
