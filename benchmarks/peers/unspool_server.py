"""Unspool, to be measured. `--settings` go to `Engine.load`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from protocol import Answer, Job, serve
from taken import Taken

import unspool


class Ours:
    """The engine."""

    offers = ("greedy", "beam", "drafts", "sharing")
    packages = ("unspool", "torch", "transformers")

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {"threads": options.threads, **options.settings}
        self._engine = unspool.Engine.load(options.model, dtype=options.dtype, **settings)
        self._taken = Taken(self._engine)

    def run(self, job: Job) -> Answer:
        """Decode a job in one batch."""
        strategy: Any = "greedy" if job.width == 1 else {"beam": {"width": job.width, "early_stopping": "never"}}
        plugins = []
        if job.drafts:
            plugins = [{"prompt_lookup": {"length": job.drafts, "min_ngram": 1, "adapt": False}}]
        requests = [
            unspool.Request(
                prompt=prompt, strategy=strategy, plugins=plugins, max_new_tokens=job.new, ignore_eos=True, n=1
            )
            for prompt in job.prompts
        ]
        self._taken.most = 0
        start = time.perf_counter()
        results = list(self._engine.run(requests, ordered=True))
        seconds = time.perf_counter() - start
        for result in results:
            if result.error is not None:
                raise result.error
        return Answer(
            seconds,
            [list(result.token_ids) for result in results],
            first=max(result.stats.first_token_s for result in results),
            kv_bytes=self._taken.most * self._engine.runner.slot_bytes(),
            passes=max(result.stats.forward_passes for result in results),
        )


if __name__ == "__main__":
    serve(Ours)
