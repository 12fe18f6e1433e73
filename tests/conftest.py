"""Lets tests import what stands beside them (`pipelines`) and in docs (`generate`); closes with what was skipped."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "docs")]
torch.set_num_threads(1)  # tests run side by side, and on small tensors threads only wait for each other


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """Close with a count of what was skipped, and why: a run without outside data must not look like a whole one."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    count = len(reports)
    said = "No test was skipped." if not count else f"{count} {'tests were' if count > 1 else 'test was'} skipped:"
    terminalreporter.write_line(said)
    for reason, times in reasons.most_common():
        terminalreporter.write_line(f"  {times} x {reason}")
