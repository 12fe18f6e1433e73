"""What a step frees is there for the next one, without asking the system again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from unspool.huggingface.memory import keep_freed

print(keep_freed())
for _ in range(3):
    tensors = [torch.ones(2_000_000) for _ in range(3)]
    del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    tensors = [torch.ones(2_000_000) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**settings: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not glibc")
def test_what_is_freed_is_kept_unless_the_user_says_otherwise() -> None:
    kept, few = faults()
    if kept == "False":
        pytest.skip("not glibc, or set by the user")
    left, many = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert left == "False"
    assert few < 1000 < many  # a page of 4 KB at a time: 24 MB are 6000
