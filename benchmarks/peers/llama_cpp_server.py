"""llama.cpp, to be measured by calls of its library: all sequences in one batch, as its `llama-batched-bench` does.

Keys and values are float32 beside float32 weights, and what llama.cpp itself chooses (float16) beside bfloat16 ones.
The likeliest token is chosen by llama.cpp's own greedy sampler.
"""

from __future__ import annotations

import argparse
import time

import llama_cpp
from protocol import Answer, Job, serve

ROWS = 512
"""Most tokens of a pass, as in Unspool."""


class LlamaCpp:
    """The model; a context is made for every job."""

    offers = ("greedy",)
    packages = ("llama-cpp-python",)

    def __init__(self, options: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        self._dtype, self._threads = options.dtype, options.threads
        model = llama_cpp.llama_model_load_from_file(options.model.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {options.model}")
        self._model = model
        self._greedy = llama_cpp.llama_sampler_init_greedy()

    def run(self, job: Job) -> Answer:
        """Decode a job: prompts in pieces of `ROWS` tokens, then a token of every sequence a pass."""
        context = self._context(job)
        batch = llama_cpp.llama_batch_init(max(ROWS, len(job.prompts)), 0, 1)
        try:
            return self._decode(context, batch, job)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _context(self, job: Job) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(job.prompts) * _padded(max(map(len, job.prompts)) + job.new)
        params.n_batch = params.n_ubatch = max(ROWS, len(job.prompts))
        params.n_seq_max = len(job.prompts)
        params.kv_unified = False  # each sequence attends to its own alone
        params.n_threads = params.n_threads_batch = self._threads
        if self._dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def _decode(self, context: llama_cpp.llama_context_p, batch: llama_cpp.llama_batch, job: Job) -> Answer:
        start = time.perf_counter()
        rows = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(job.prompts)
            for place, token in enumerate(prompt)
        ]
        new: list[list[int]] = [[] for _ in job.prompts]
        for begin in range(0, len(rows), ROWS):
            self._pass(context, batch, rows[begin : begin + ROWS], new)
        first = time.perf_counter() - start
        for _ in range(job.new - 1):
            rows = [
                (ids[-1], len(prompt) + len(ids) - 1, i, True)
                for i, (prompt, ids) in enumerate(zip(job.prompts, new, strict=True))
            ]
            self._pass(context, batch, rows, new)
        return Answer(time.perf_counter() - start, new, first=first)

    def _pass(
        self,
        context: llama_cpp.llama_context_p,
        batch: llama_cpp.llama_batch,
        rows: list[tuple[int, int, int, bool]],
        new: list[list[int]],
    ) -> None:
        """Run rows of (token, place, sequence, whether its logits are wanted), and append what follows them."""
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        for i, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                new[sequence].append(llama_cpp.llama_sampler_sample(self._greedy, context, i))


def _padded(tokens: int) -> int:
    """Round up to what llama.cpp lays out."""
    return -(-tokens // 256) * 256


if __name__ == "__main__":
    serve(LlamaCpp)
