"""Sides of a comparison: an engine with its settings, in a process of its own that keeps its model loaded."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import environments, weights
from peers.machine import cores
from peers.protocol import Answer, Job

LOADING_LIMIT = 1800
"""Seconds that loading may take: vLLM compiles at its first start, for minutes on a slow machine."""
_HERE = Path(__file__).parent


class Failed(Exception):
    """A side did not do its job, with the reason."""


@dataclass(frozen=True)
class Engine:
    """An engine that can be measured.

    Args:
        script: serves it.
        environment: whose Python runs it; None: this one's.
        gguf: whether it reads GGUF files.
        settings: what its server is given.
    """

    script: str
    environment: str | None = None
    gguf: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


ENGINES = {
    "unspool": Engine("unspool_server.py"),
    "transformers": Engine("transformers_server.py"),
    "transformers-continuous": Engine("continuous_server.py"),
    "vllm": Engine("vllm_server.py", "vllm"),
    "vllm-eager": Engine("vllm_server.py", "vllm", settings={"enforce_eager": True}),
    "llama_cpp": Engine("llama_cpp_server.py", "llama_cpp", gguf=True),
}


class Side:
    """An engine with its settings. Its process starts at the first job, and anew after one that it did not survive.

    Args:
        engine: a name of `ENGINES`.
        dtype: of the weights.
        threads: that it may use.
        settings: over the engine's own.
        limit: seconds that a job may take.
    """

    def __init__(
        self, engine: str, dtype: str, threads: int, settings: Mapping[str, Any] | None = None, limit: float = 900
    ) -> None:
        given = dict(settings or {})
        self.name = " ".join([engine, *(f"{key}={value}" for key, value in given.items())])
        self.versions: dict[str, str] = {}
        self.offers: list[str] = []
        self.broken: str | None = None
        """Why it cannot be loaded; None: it can, or that is not known yet."""
        self._engine, self._dtype, self._threads, self._limit = ENGINES[engine], dtype, threads, limit
        self._settings = {**self._engine.settings, **given}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._log = Path()

    def start(self) -> None:
        """Load the model, if it is not.

        Raises:
            Failed: it cannot be loaded.
        """
        if self.broken is not None:
            raise Failed(self.broken)
        if self._process is not None:
            return
        try:
            self._process = self._started()
            greeting = self._read(LOADING_LIMIT)
            self.offers, self.versions = greeting["offers"], greeting["versions"]
        except Exception as error:  # whatever is wrong with one engine, the others go on
            self.close()
            self.broken = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            raise Failed(self.broken) from error

    def run(self, job: Job) -> Answer:
        """Have a job done.

        Raises:
            Failed: it was not, or took too long.
        """
        self.start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.close()
            raise Failed(f"it ended: {environments.last_words(self._log)}") from error
        return Answer(**self._read(self._limit))

    def close(self) -> None:
        """End its process, with all that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        engine = self._engine
        python = Path(sys.executable) if engine.environment is None else environments.python_of(engine.environment)
        model = weights.gguf_file(self._dtype) if engine.gguf else weights.folder()
        command = [str(python), str(_HERE / engine.script), "--model", str(model), "--dtype", self._dtype]
        command += ["--threads", str(self._threads), "--settings", json.dumps(self._settings)]
        self._log = environments.log_of(f"{self.name.replace('/', '_')} {self._dtype}")
        lines = self._lines = queue.SimpleQueue()
        with self._log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._variables(),
                start_new_session=True,
            )

        def pump() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        return process

    def _variables(self) -> dict[str, str]:
        """Give the environment variables that it runs with."""
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if self._engine.environment == "vllm":
            variables |= {
                "OMP_NUM_THREADS": str(self._threads),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores()[: self._threads])),
                "VLLM_CPU_KVCACHE_SPACE": "4",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
            }
            # Without Intel's OpenMP, as vLLM's own guide says, its threads sleep at every barrier: ten times slower.
            library = environments.PLACE / "vllm" / "lib" / "libiomp5.so"
            if library.exists():
                variables["LD_PRELOAD"] = str(library)
        return variables

    def _read(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise Failed(f"no answer within {limit:g} s") from None
        if line is None:
            self.close()
            raise Failed(f"it ended: {environments.last_words(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer
