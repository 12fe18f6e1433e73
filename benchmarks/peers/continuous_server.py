"""transformers' continuous batching (`generate_batch`), to be measured.

Its pool is made to hold what the job needs: left to itself it takes most of the memory, and fills all of it at every
call.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
import transformers
from protocol import Answer, Job, serve

PAGE = 32
ROWS = 512
"""Most tokens of a pass, as in Unspool."""


class GenerateBatch:
    """The model."""

    offers = ("greedy",)
    packages = ("transformers", "torch")

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        dtype = getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, attn_implementation="sdpa"
        )
        self._model: Any = model.eval()

    def run(self, job: Job) -> Answer:
        """Decode a job in one call."""
        pages = sum(math.ceil((len(prompt) + job.new + 1) / PAGE) + 1 for prompt in job.prompts)
        pool = transformers.ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=ROWS)
        settings = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=job.new, eos_token_id=-1, pad_token_id=0
        )
        start = time.perf_counter()
        out = self._model.generate_batch(job.prompts, generation_config=settings, continuous_batching_config=pool)
        seconds = time.perf_counter() - start
        return Answer(seconds, [list(each.generated_tokens) for each in out.values()])


if __name__ == "__main__":
    serve(GenerateBatch)
