"""Tokens a second against transformers' `generate`, side by side in one run, on the real model.

    python benchmarks/throughput.py [--dtypes float32,bfloat16] [--repeats 3] [--json OUT]

Greedy, end ids ignored on both sides, 128 new tokens. Batch 1: a prompt of 128 tokens. Batch 32: ragged prompts of 16 to
256 tokens (padded on the left for transformers, packed here). The two take turns, so that a change of the machine's
speed meets both; the figures are medians, and the ratio is the median of the ratios of each pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers

import unspool
from unspool.huggingface.load import local_folder


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
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
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


def compare(dtype: str, batches: list[int], new: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Time both sides in turn for each batch size."""
    model = transformers.AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=getattr(torch, dtype))
    model.to(device).eval()
    rows = []
    with unspool.Engine.load("smollm2", dtype=dtype, device=device) as engine:
        for batch in batches:
            prompts = prompts_of(batch, engine.runner.vocab_size)
            time_transformers(model, prompts, 8)
            time_unspool(engine, prompts, 8)
            theirs, ours = [], []
            for _ in range(repeats):
                theirs.append(batch * new / time_transformers(model, prompts, new))
                ours.append(batch * new / time_unspool(engine, prompts, new))
            ratio = statistics.median(b / a for a, b in zip(theirs, ours, strict=True))
            row = {
                "dtype": dtype,
                "batch": batch,
                "transformers_tok_s": round(statistics.median(theirs), 1),
                "unspool_tok_s": round(statistics.median(ours), 1),
                "ratio": round(ratio, 2),
            }
            print(f"| {dtype} | {batch} | {row['transformers_tok_s']} | {row['unspool_tok_s']} | {row['ratio']} |", flush=True)
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
    options = parser.parse_args()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unspool": unspool.__version__,
        "threads": torch.get_num_threads(),
    }
    print(versions)
    print(f"| dtype | batch | transformers tok/s | unspool tok/s | ratio |\n|---|---|---|---|---|")
    rows = []
    for dtype in options.dtypes.split(","):
        batches = [int(batch) for batch in options.batches.split(",")]
        rows += compare(dtype, batches, options.new, options.repeats, options.device)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
