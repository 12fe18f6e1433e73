"""How much memory is free for a pool of slots."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Count the bytes that are free on a device now: of a GPU, or of the machine or container for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine(), _container())


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
