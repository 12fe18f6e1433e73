"""The machine that the figures are of: its processor, and how fast it reads memory and multiplies."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
"""What tells which kernels an engine may choose."""
_BIG = 1 << 28
_SIDE = 2048
_TRIES = 5


def cores() -> list[int]:
    """Name one processor of each core that this process may run on."""
    seen: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        place = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings = place.read_text(encoding="utf-8").strip() if place.exists() else str(number)
        seen.setdefault(siblings, number)
    return list(seen.values())


def describe(threads: int, dtypes: list[str]) -> dict[str, Any]:
    """Tell what the machine is, and measure its limits.

    Returns:
        With `bandwidth` in bytes a second, and `peak` in operations a second by dtype.
    """
    torch.set_num_threads(threads)
    about = _cpuinfo()
    return {
        "processor": about.get("model name", platform.processor() or "unknown"),
        "cores": len(cores()),
        "threads": threads,
        "flags": [flag for flag in FLAGS if flag in about.get("flags", "").split()],
        "bandwidth": _bandwidth(),
        "peak": {dtype: _peak(getattr(torch, dtype)) for dtype in dtypes},
    }


def sentence(machine: dict[str, Any]) -> str:
    """Say it in a line."""
    peaks = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in machine["peak"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{' '.join(machine['flags']) or 'no wide vectors'}; memory is read at {machine['bandwidth'] / 1e9:.1f} GB/s, "
        f"products reach (GFLOP/s) {peaks}"
    )


def _cpuinfo() -> dict[str, str]:
    place = Path("/proc/cpuinfo")
    if not place.exists():
        return {}
    lines = place.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _bandwidth() -> float:
    numbers = torch.ones(_BIG)  # a gibibyte, beyond every cache
    return numbers.nbytes / _quickest(numbers.max)


def _peak(dtype: torch.dtype) -> float:
    """Measure products of a dtype, or of float32 where the processor has none of its own for it and they are slower."""
    reached = 0.0
    for kind in {dtype, torch.float32 if dtype.itemsize < 4 else dtype}:
        side = _SIDE if kind == torch.float32 else _SIDE // 8  # without instructions the large one takes minutes
        a, b = (torch.rand(side, side).to(kind) for _ in range(2))
        reached = max(reached, 2 * side**3 / _quickest(lambda a=a, b=b: a @ b))
    return reached


def _quickest(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
