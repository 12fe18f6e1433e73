"""Steps as CUDA graphs: a pass of few rows is recorded once, and then played with other numbers in the same tensors.

A step of a small batch spends its time on starting thousands of kernels one by one; a graph starts them all at once. It
cannot change its shapes, so there is a recording for each of a few numbers of rows, made when it is first needed, and a
step takes the smallest that it fits into. Padded rows are tokens of nobody: they write to the pool's last slot, which
belongs to nobody either, and see it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from unspool.huggingface.flex import FlexPlan, Read, Sight, marks, runs, sent
from unspool.huggingface.package import Subject
from unspool.huggingface.pool import Pool
from unspool.runner import Batch, Output

_log = logging.getLogger(__name__)
BUCKETS = tuple(1 << power for power in range(9))
"""The numbers of rows that are recorded: 1, 2, 4, ... 256."""
_WARM_UPS = 2
Pass = Callable[[], Output]
Recorder = Callable[[Pass], Pass | None]
"""Turns a pass over tensors that stay into one that does the same to them again, and gives the same tensors.

None: it cannot be recorded.
"""


class Graphs:
    """Runs passes in which every row is wanted, from recordings.

    Args:
        subject: the model whose passes they are.
        pool: where keys and values are kept. It has a slot more than anybody was told of (`flex.room`).
        recorder: records a pass; by default as a CUDA graph on a GPU, and not at all elsewhere.
    """

    name = "graphs"

    def __init__(self, subject: Subject, pool: Pool, recorder: Recorder | None = None) -> None:
        if recorder is None:
            recorder = CudaRecorder() if pool.device.type == "cuda" else _unrecorded
        self._subject, self._pool, self._recorder = subject, pool, recorder
        self._recordings: dict[tuple[int, tuple[int, ...]], Recording] = {}
        self.records = True
        """False once a pass could not be recorded: a model of which one cannot is not asked again."""

    def takes(self, batch: Batch) -> bool:
        """Say whether it can run a batch: all layers, and no prompt whose logits nobody wants."""
        return batch.layers is None and len(batch.wanted) == len(batch.slots) <= BUCKETS[-1]

    def run(self, pool: Pool, batch: Batch) -> Output:
        """Run one packed pass."""
        assert pool is self._pool, "recordings know the pool by its address"
        key = next(rows for rows in BUCKETS if rows >= len(batch.slots)), tuple(batch.hidden)
        if key not in self._recordings:
            self._recordings[key] = Recording(self._subject, pool, *key, self._record)
        return self._recordings[key].run(batch)

    def _record(self, step: Pass) -> Pass:
        played = self._recorder(step) if self.records else None
        self.records = played is not None
        return played or step


class Recording:
    """The pass of one number of rows, over tensors that stay.

    Args:
        subject: the model.
        pool: where keys and values are kept.
        rows: how many rows it has.
        hidden: the hidden states that it gives.
        record: records it, when it is first run.
    """

    def __init__(
        self, subject: Subject, pool: Pool, rows: int, hidden: tuple[int, ...], record: Callable[[Pass], Pass]
    ) -> None:
        self._subject, self._pool, self._rows, self._hidden = subject, pool, rows, hidden
        self._numbers = torch.zeros(3, rows, dtype=torch.long, device=pool.device)  # token ids, positions, slots
        self._sights = {window: Sight(rows, 1, len(pool.positions), pool.device) for window in pool.windows}
        self._record = record
        self._play: Pass | None = None

    def run(self, batch: Batch) -> Output:
        """Run a batch that has no more rows. What it gives is the caller's to keep."""
        self._show(batch)
        if self._play is None:
            self._play = self._record(self._pass)
        output, count = self._play(), len(batch.slots)
        hidden = {number: states[:count].clone() for number, states in output.hidden.items()}
        return Output(output.logits[:count].clone(), hidden)

    def _show(self, batch: Batch) -> None:
        """Put a batch into the tensors, with rows of nobody behind it, by one copy to the device."""
        pool, count, rows = self._pool, len(batch.slots), self._rows
        pool.positions[batch.slots] = batch.positions
        nobody = len(pool.positions) - 1
        numbers = np.zeros((3, rows), dtype=np.int64)
        numbers[:, :count] = batch.token_ids, batch.positions, batch.slots
        numbers[2, count:] = nobody
        padding = np.array([[row, nobody, nobody + 1] for row in range(count, rows)], dtype=np.int64).reshape(-1, 3)
        tiling, arrays = np.arange(rows)[:, None], [numbers]
        for window in self._sights:
            arrays += marks(np.concatenate([runs(pool, batch, window), padding]), tiling)
        there, *tables = sent(arrays, pool.device)
        self._numbers.copy_(there)
        for at, sight in enumerate(self._sights.values()):
            sight.show(*tables[2 * at : 2 * at + 2])

    def _pass(self) -> Output:
        token_ids, positions, slots = self._numbers
        model = self._subject.model
        with self._subject.listening(model, self._hidden) as hidden:
            output = model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                unspool=FlexPlan(self._pool, slots, [Read(None, self._sights)]),
            )
        return Output(output.logits[0], hidden)


class CudaRecorder:
    """Records passes as CUDA graphs. All share one pool of memory: what one gives is copied before another is played.

    A model whose own code waits for the GPU (some mixtures of experts) cannot be recorded: its passes run unrecorded.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Pass) -> Pass | None:
        """Warm a pass up, then record it."""
        before, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(before)
        with torch.cuda.stream(beside):  # what is compiled or set up at first must not be recorded
            for _ in range(_WARM_UPS):
                step()
        before.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                output = step()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own behind
            _log.warning("steps run without CUDA graphs, since the model cannot be recorded: %s", error)
            return None

        def play() -> Output:
            graph.replay()
            return output

        return play


def _unrecorded(step: Pass) -> Pass:
    return step
