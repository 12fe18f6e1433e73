"""Tokens a second against transformers' `generate`, side by side in one run, on the real model.

    python benchmarks/throughput.py [--dtypes float32,bfloat16] [--repeats 3] [--apart] [--json OUT]

Greedy, end ids ignored on both sides, 128 new tokens. Batch 1: a prompt of 128 tokens. Batch 32: ragged prompts of 16
to 256 tokens (padded on the left for transformers, packed here). The two take turns, so that a change of the machine's
speed meets both; the figures are medians, and the ratio is the median of the ratios of each pair. With `--apart` each
side has a process of its own. In one process the two sides' OpenMP threads outnumber two cores, and both are slower.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers
from figures import versions, write

import unspool
from unspool.huggingface.load import local_folder

VOCABULARY = 49152


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    """Make prompts of token ids: one of 128, or ragged ones of 16 to 256."""
    generator = torch.Generator().manual_seed(0)
    lengths = [128] if count == 1 else torch.linspace(16, 256, count).long().tolist()
    return [torch.randint(100, vocab, (length,), generator=generator).tolist() for length in lengths]


def time_transformers(model: Any, prompts: list[list[int]], new: int) -> float:
    """Time `generate` on all prompts in one left-padded batch: seconds."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, **settings)
    seconds = time.perf_counter() - start
    assert out.shape[1] == longest + new
    return seconds


def time_unspool(engine: unspool.Engine, prompts: list[list[int]], new: int) -> float:
    """Time the engine on all prompts: seconds."""
    requests = [unspool.Request(prompt=p, strategy="greedy", max_new_tokens=new, ignore_eos=True) for p in prompts]
    start = time.perf_counter()
    results = list(engine.run(requests))
    seconds = time.perf_counter() - start
    assert all(len(result.token_ids) == new for result in results)
    return seconds


class Side:
    """One of the two, with its model loaded, to be timed again and again."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.name = name
        if name == "unspool":
            self._engine = unspool.Engine.load("smollm2", dtype=dtype, device=device, prefix_cache=False)
        else:
            folder = local_folder("smollm2")
            self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            self._model.to(device).eval()

    def seconds(self, batch: int, new: int) -> float:
        """Time one batch."""
        prompts = prompts_of(batch, VOCABULARY)
        if self.name == "unspool":
            return time_unspool(self._engine, prompts, new)
        return time_transformers(self._model, prompts, new)


class Apart:
    """A side in a process of its own: neither side's threads disturb the other's."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        command = [sys.executable, __file__, "--serve", name, "--dtypes", dtype, "--device", device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, batch: int, new: int) -> float:
        """Time one batch there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(batch, new, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def serve(name: str, dtype: str, device: str) -> None:
    """Time what the parent asks for, line by line."""
    side = Side(name, dtype, device)
    for line in sys.stdin:
        batch, new = map(int, line.split())
        print(side.seconds(batch, new), flush=True)


def compare(dtype: str, batches: list[int], new: int, repeats: int, device: str, apart: bool) -> list[dict[str, Any]]:
    """Time both sides in turn for each batch size."""
    kind = Apart if apart else Side
    sides = [kind(name, dtype, device) for name in ("transformers", "unspool")]
    rows = []
    for batch in batches:
        for side in sides:
            side.seconds(batch, 8)
        speeds = [[batch * new / side.seconds(batch, new) for side in sides] for _ in range(repeats)]
        theirs, ours = (statistics.median(column) for column in zip(*speeds, strict=True))
        ratio = statistics.median(b / a for a, b in speeds)
        row = {
            "dtype": dtype,
            "batch": batch,
            "transformers_tok_s": round(theirs, 1),
            "unspool_tok_s": round(ours, 1),
            "ratio": round(ratio, 2),
        }
        print("|", " | ".join(map(str, row.values())), "|", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--apart", action="store_true", help="each side in a process of its own")
    parser.add_argument("--serve", choices=["transformers", "unspool"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.serve:
        serve(options.serve, options.dtypes, options.device)
        return
    print(versions())
    print("| dtype | batch | transformers tok/s | unspool tok/s | ratio |\n|---|---|---|---|---|")
    rows = []
    for dtype in options.dtypes.split(","):
        batches = [int(batch) for batch in options.batches.split(",")]
        rows += compare(dtype, batches, options.new, options.repeats, options.device, options.apart)
    write(options.json, rows)


if __name__ == "__main__":
    main()
