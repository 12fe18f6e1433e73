"""How long a person waits for the demo's first word: the first start, with nothing cached, and the ones after it.

    python benchmarks/start.py [--repeats 3] [--command FILE] [--json OUT]

Each repeat has a cache folder of its own. The first start in it converts the model's file, the second finds it
converted. The clock runs from the start of the process of `docs/demo/demo.py` to the first byte of its first answer;
then its processes are ended. CPU seconds are what they had used by then (Linux only): they say more than the clock
where others load the machine. What pip installed is in the system's file cache after the first repeat at the latest.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from figures import versions, write

DEMO = Path(__file__).parents[1] / "docs" / "demo" / "demo.py"
HEADINGS = ["start", "median s", "lowest", "highest", "CPU s"]


def time_to_first_token(command: Path, cache: str) -> tuple[float, float]:
    """Start the demo and wait for the first byte after its first command line.

    Returns:
        Seconds, and CPU seconds.

    Raises:
        RuntimeError: it ended before that.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": cache},
        start_new_session=True,  # it has processes of its own, and all end with it
        bufsize=0,
    )
    assert process.stdout is not None
    try:
        _skip_to_answer(process.stdout)
        return time.perf_counter() - start, _cpu_seconds(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _skip_to_answer(shown: IO[bytes]) -> None:
    for line in iter(shown.readline, b""):
        if line.startswith(b"$ unspool generate") and shown.read(1):
            return
    raise RuntimeError("the demo ended without an answer")


def _cpu_seconds(session: int) -> float:
    """Add up what the processes of a session have used."""
    ticks = 0
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            _, _, _, number, *fields = place.read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += sum(map(int, fields[7:9])) if int(number) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--command", type=Path, default=DEMO, help="the demo of another checkout, to compare with")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"first": [], "later": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="unspool-start-") as cache:
            for taken in times.values():
                taken.append(time_to_first_token(options.command, cache))
    print(versions())
    print("|", " | ".join(HEADINGS), "|\n|" + "---|" * len(HEADINGS))
    rows = []
    for name, taken in times.items():
        seconds, cpu = zip(*taken, strict=True)
        figures = statistics.median(seconds), min(seconds), max(seconds), statistics.median(cpu)
        rows.append([name, *(round(figure, 2) for figure in figures)])
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    write(options.json, [dict(zip(HEADINGS, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
