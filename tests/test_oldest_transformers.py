"""The oldest transformers that the distributions allow gives the same tokens as the newest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = os.environ.get("UNSPOOL_OLDEST_TRANSFORMERS", "")


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST, reason="UNSPOOL_OLDEST_TRANSFORMERS names no folder (make test sets it)")
def test_greedy_equals_generate_on_every_architecture_with_the_oldest_transformers_allowed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(OLDEST).resolve())}
    shown = "import transformers; print(transformers.__version__)"
    version = subprocess.run([sys.executable, "-c", shown], env=environment, capture_output=True, text=True, check=True)
    assert version.stdout.strip() == "5.17.0"
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "test_parity.py", "-k", "tiny"],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout and "No test was skipped." in run.stdout
