"""The pool takes its memory as it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unspool.huggingface.pool import Layer, Pool


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_all_slots_are_zero_at_first() -> None:
    layer = Layer(2, 4, 6, torch.bfloat16)
    pool = Pool([layer, layer], 5, torch.device("cpu"))
    assert [tuple(rows.shape) for rows in pool.rows] == [(1, 2, 5, 4)] * 2 + [(1, 2, 5, 6)] * 2
    assert all(rows.dtype == torch.bfloat16 and not rows.any() for rows in pool.rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_token_takes_no_more_memory_than_it_fills_and_the_ends_of_pages() -> None:
    layers = [Layer(8, 64, 64, torch.float32)] * 4
    pool = Pool(layers, 1 << 14, torch.device("cpu"))  # 4 MB a head: as large as a huge page and more
    before = resident_bytes()
    for rows in pool.rows:
        rows[:, :, 0] = 1.0
    assert resident_bytes() - before < 4 << 20  # of 256 MB
