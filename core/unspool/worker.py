"""The one thread that computes.

OpenMP keeps a team of threads for every thread that ever ran a parallel operation. Once there are more of them than
cores its barriers sleep instead of spinning, and small operations take several times as long. So a model is loaded on
the thread that will run it, and nobody else computes. See `docs/performance.md`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A daemon thread that runs what it is given, in order."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="unspool", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function there, wait for it, and give what it gives or raise what it raises."""
        return self.start(function).result()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Have a function run there after what was given before."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def stop(self) -> None:
        """End the thread after what it was given, and wait for that."""
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del call, function, future  # keep nothing alive while waiting
