"""Beam search against transformers' `generate`, side by side in one run, on the real model.

    python benchmarks/search.py [--dtypes float32,bfloat16] [--widths 4,8] [--prompts 128,1024] [--batches 1,8]
                                [--new 32] [--repeats 3] [--contrastive] [--json OUT]

Random prompts of one length (transformers pads nothing), end ids ignored, `early_stopping="never"` (so that both
run to the last token). Tokens are those returned: batch x new. The two sides take turns in one process; the figures are
medians, the ratio is the median of the ratios of each pair.

Keys and values: transformers' are the bytes of the cache that it returns; ours the most slots that were taken at once,
times the bytes of one. `--contrastive` times contrastive search too, alone: transformers has none any more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
import transformers
from figures import versions, write
from peers.taken import Taken

import unspool
from unspool.huggingface.load import local_folder

VOCABULARY = 49152
HEADINGS = [
    "dtype",
    "width",
    "prompt",
    "batch",
    "transformers tok/s",
    "unspool tok/s",
    "ratio",
    "transformers KV MB",
    "unspool KV MB",
]


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Make prompts of random token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, VOCABULARY, (count, length), generator=generator).tolist()


class Theirs:
    """transformers, with the model loaded."""

    def __init__(self, dtype: str, device: str) -> None:
        made = transformers.AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=getattr(torch, dtype))
        self._model = made.to(device).eval()
        self.megabytes = 0.0

    def seconds(self, prompts: list[list[int]], width: int, new: int) -> float:
        """Time one batch."""
        ids = torch.tensor(prompts, device=self._model.device)
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            early_stopping="never",
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        assert out.sequences.shape == (len(prompts), ids.shape[1] + new)
        layers = out.past_key_values.layers
        self.megabytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / 1e6
        return seconds


class Ours:
    """The engine, with the model loaded."""

    def __init__(self, dtype: str, device: str) -> None:
        self._engine = unspool.Engine.load("smollm2", dtype=dtype, device=device, prefix_cache=False)
        self._taken = Taken(self._engine)
        self.megabytes = 0.0

    def seconds(self, prompts: list[list[int]], width: int, new: int, strategy: str = "beam") -> float:
        """Time one batch."""
        chosen = {"beam": {"width": width, "early_stopping": "never"}, "contrastive_search": {"top_k": width}}
        requests = [
            unspool.Request(
                prompt=prompt, strategy={strategy: chosen[strategy]}, max_new_tokens=new, ignore_eos=True, n=1
            )
            for prompt in prompts
        ]
        self._taken.most = 0
        start = time.perf_counter()
        results = list(self._engine.run(requests))
        seconds = time.perf_counter() - start
        assert all(len(result.token_ids) == new for result in results)
        if strategy == "contrastive_search":  # one forward of k rows a token, the last one's candidates included
            assert all(result.stats.forward_passes <= new + 8 for result in results)
        self.megabytes = self._taken.most * self._engine.runner.slot_bytes() / 1e6
        return seconds


def compare(dtype: str, options: argparse.Namespace) -> list[list[Any]]:
    """Time both sides in turn in each cell."""
    theirs, ours = Theirs(dtype, options.device), Ours(dtype, options.device)
    rows = []
    for width, length, batch in itertools.product(options.widths, options.prompts, options.batches):
        prompts, new = prompts_of(batch, length), options.new
        for side in (theirs, ours):
            side.seconds(prompts[:1], width, 4)
        pairs = []
        for _ in range(options.repeats):
            a, b = theirs.seconds(prompts, width, new), ours.seconds(prompts, width, new)
            pairs.append((batch * new / a, batch * new / b))
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        memory = [round(theirs.megabytes, 1), round(ours.megabytes, 1)]
        row = [dtype, width, length, batch, round(before, 2), round(after, 2), round(ratio, 2), *memory]
        print("|", " | ".join(map(str, row)), "|", flush=True)
        rows.append(row)
    return rows


def contrastive(dtype: str, options: argparse.Namespace) -> None:
    """Time contrastive search of k candidates beside beam search of as many beams: both run k rows a token."""
    ours = Ours(dtype, options.device)
    print("\n| dtype | k | prompt | batch | contrastive tok/s | beam tok/s |\n|---|---|---|---|---|---|")
    for k, length, batch in itertools.product(options.widths, options.prompts, options.batches):
        prompts = prompts_of(batch, length)
        seconds = [ours.seconds(prompts, k, options.new, strategy) for strategy in ("contrastive_search", "beam")]
        speeds = [round(batch * options.new / second, 2) for second in seconds]
        print("|", " | ".join(map(str, [dtype, k, length, batch, *speeds])), "|", flush=True)


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--widths", type=numbers, default=[4, 8])
    parser.add_argument("--prompts", type=numbers, default=[128, 1024])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contrastive", action="store_true", help="time contrastive search as well")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(versions())
    print("|", " | ".join(HEADINGS), "|\n|" + "---|" * len(HEADINGS))
    rows = []
    for dtype in options.dtypes.split(","):
        rows += compare(dtype, options)
        if options.contrastive:
            contrastive(dtype, options)
    write(options.json, [dict(zip(HEADINGS, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
