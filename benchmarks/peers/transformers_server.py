"""transformers' `generate`, to be measured: one batch, padded on the left."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from protocol import Answer, Job, serve
from transformers.generation.streamers import BaseStreamer


class Generate:
    """The model."""

    offers = ("greedy", "beam")
    packages = ("transformers", "torch")

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        dtype = getattr(torch, options.dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()

    def run(self, job: Job) -> Answer:
        """Decode a job in one call."""
        longest = max(map(len, job.prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in job.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in job.prompts])
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": job.new, "eos_token_id": None}
        settings |= {"pad_token_id": 0, "return_dict_in_generate": True}
        arrivals = _Arrivals()
        if job.width > 1:
            settings |= {"num_beams": job.width, "early_stopping": "never"}
        else:
            settings["streamer"] = arrivals
        start = time.perf_counter()
        out = self._model.generate(ids, attention_mask=mask, **settings)
        seconds = time.perf_counter() - start
        layers = out.past_key_values.layers
        return Answer(
            seconds,
            out.sequences[:, longest:].tolist(),
            first=None if len(arrivals.times) < 2 else arrivals.times[1] - start,
            kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        )


class _Arrivals(BaseStreamer):
    """Takes the time of the prompt's arrival and of each token's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


if __name__ == "__main__":
    serve(Generate)
