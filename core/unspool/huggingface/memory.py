"""Memory: how much is free for a pool of slots, and that steps do not fetch theirs from the system each time."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Count the bytes that are free on a device now: of a GPU, or of the machine or container for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine(), _container())


_TRIM, _TRIMMED = -1, 256 * 2**20  # M_TRIM_THRESHOLD: how much that is free at the end is given back
_MMAP, _MAPPED = -3, 32 * 2**20  # M_MMAP_THRESHOLD: what is asked for by itself and always given back; its greatest


@functools.cache
def keep_freed() -> bool:
    """Have glibc keep up to 256 MiB of what is freed, and say whether it does. What a user has set is left.

    A step over a vocabulary takes and frees tensors of megabytes. By default glibc gives such back to the system at
    once, and each page of the next one is fetched and zeroed again: that was up to two thirds of what a strategy's own
    work takes. (Asked once for a process: it cannot be taken back.)
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return set_option is not None and all([set_option(_TRIM, _TRIMMED), set_option(_MMAP, _MAPPED)])


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Elsewhere only the total is to be had without another package: half of it is a careful guess.
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 8 * 2**30
    return total // 2


def _container() -> int:
    """Count what the container's memory limit leaves; page cache that can be dropped counts as free."""
    for limit, usage, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        folder = Path("/sys/fs/cgroup")
        try:
            most = (folder / limit).read_text().strip()
            if most != "max":
                counts = dict(line.split() for line in (folder / stat).read_text().splitlines())
                return int(most) - int((folder / usage).read_text()) + int(counts.get(cache, 0))
        except (OSError, ValueError):
            continue
    return 2**63 - 1
