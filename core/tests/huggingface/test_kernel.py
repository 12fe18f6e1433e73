"""The attention kernel gives what plain torch gives, whatever the batch looks like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from unspool.errors import ModelError
from unspool.huggingface import HuggingFaceRunner, kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.plan import Plan
from unspool.huggingface.pool import Layer, Pool
from unspool.huggingface.table import TablePlan
from unspool.runner import Batch, Span
from unspool_testing.networks import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(kernel.compiler() is None, reason="no C++ compiler")
CLOSE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    kernel.build()
    assert kernel.available()


class Case:
    """A pool with something in it, and a random batch over it."""

    def __init__(self, seed: int, layer: Layer, heads: int, **settings: Any) -> None:
        self.random = np.random.default_rng(seed)
        self.layer, self.heads, self.settings = layer, heads, settings
        self.size = int(self.random.choice([400, 2500]))
        self.unused = self.random.permutation(self.size // 20) * 20  # stretches of 20 slots
        self.spans: list[Span] = []
        self.columns: list[list[NDArray[np.int64]]] = []
        self.tokens = 0
        shared = self.slots(self.size // 8)
        while self.tokens == 0 or (len(self.unused) > 1 and self.random.random() < 0.7):
            kind = self.random.choice(["step", "chunk", "tree", "sharer"])
            if kind == "tree":
                self.tree(int(self.random.integers(2, 40)))
            else:
                count = 1 if kind == "step" else int(self.random.integers(1, 60))
                own = self.slots(count + int(self.random.integers(0, self.size // 12)))
                self.chain(np.concatenate([shared, own]) if kind == "sharer" else own, min(count, len(own)))

    def slots(self, count: int) -> NDArray[np.int64]:
        stretches, self.unused = np.split(self.unused, [min(len(self.unused), -(-count // 20))])
        if self.random.random() < 0.5:
            stretches = np.sort(stretches)
        return (stretches[:, None] + np.arange(20)).ravel()[: max(1, count)]

    def chain(self, slots: NDArray[np.int64], count: int) -> None:
        consecutive = bool((np.diff(slots) == 1).all())
        context: Any = slice(int(slots[0]), int(slots[-1]) + 1) if consecutive else slots
        self.spans.append(Span(self.tokens, count, context))
        self.add(np.arange(len(slots) - count, len(slots)), slots[len(slots) - count :])

    def tree(self, count: int) -> None:
        slots = self.slots(count + 30)
        count = min(count, len(slots) - 1)
        below = len(slots) - count
        mask = np.zeros((count, len(slots)), dtype=np.bool_)
        mask[:, :below] = True
        depth = np.zeros(count, dtype=np.int64)
        for node in range(count):
            parent = int(self.random.integers(-1, node))
            if parent >= 0:
                mask[node], depth[node] = mask[parent], depth[parent] + 1
            mask[node, below + node] = True
        context: Any = slots
        if (np.diff(slots) == 1).all():
            context = slice(int(slots[0]), int(slots[-1]) + 1)
        self.spans.append(Span(self.tokens, count, context, mask))
        self.add(below + depth, slots[below:])

    def add(self, positions: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        self.columns.append([positions, slots])
        self.tokens += len(slots)

    def outputs(self, plan: type[Plan] | type[TablePlan]) -> tuple[Tensor, Pool]:
        """Attend by the kernel, or by plain torch in float32 on the same numbers."""
        generator = torch.Generator().manual_seed(0)
        dtype = self.layer.dtype if plan is TablePlan else torch.float32

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.layer.dtype).to(dtype)

        pool = Pool([dataclasses.replace(self.layer, dtype=dtype)], self.size, torch.device("cpu"))
        (group, _), layer, n = pool.places[0], self.layer, self.tokens
        group.keys.copy_(some(*group.keys.shape))
        group.values.copy_(some(*group.values.shape))
        for span in self.spans:  # what lies before each token holds its own position
            pool.positions[span.context] = np.arange(span.context_length)
        positions, slots = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        batch = Batch(slots, positions, slots, self.spans, slots)
        query = some(1, n, self.heads, layer.key_width).transpose(1, 2)
        key, value = some(1, layer.kv_heads, n, layer.key_width), some(1, layer.kv_heads, n, layer.value_width)
        return plan(pool, batch).attend(Call(nn.Module(), query, key, value, None, self.settings)), pool


@given(st.integers(0, 10**9), st.data())
@settings(max_examples=150, deadline=None)
def test_the_kernel_gives_what_plain_torch_gives(seed: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([*CLOSE]))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 8)]))
    widths = data.draw(st.sampled_from([(8, 8), (64, 64), (20, 12), (7, 5), (80, 48)]))
    window = data.draw(st.sampled_from([None, None, 1, 7, 100]))
    sinks = torch.linspace(-1, 2, kv_heads * group).to(dtype) if data.draw(st.booleans()) else None
    case = Case(
        seed,
        Layer(kv_heads, *widths, dtype, window),
        kv_heads * group,
        scaling=data.draw(st.sampled_from([None, 0.3])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        s_aux=sinks,
    )
    (one, one_pool), (two, two_pool) = case.outputs(TablePlan), case.outputs(Plan)
    torch.testing.assert_close(one, two.to(dtype), **CLOSE[dtype])
    for (ours, _), (theirs, _) in zip(one_pool.places, two_pool.places, strict=True):
        assert torch.equal(ours.keys, theirs.keys.to(dtype))
        assert torch.equal(ours.values, theirs.values.to(dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [300, 3000])
def test_long_contexts_are_read_in_pieces_and_merged(threads: int, length: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(0, Layer(2, 16, 16, torch.float32), 4)
        case.spans, case.columns, case.tokens, case.size = [], [], 0, length
        case.chain(np.arange(length), 40)
        torch.testing.assert_close(case.outputs(TablePlan)[0], case.outputs(Plan)[0], **CLOSE[torch.float32])
    finally:
        torch.set_num_threads(before)


def test_queries_of_float32_may_read_a_pool_of_bfloat16() -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 8, generator=random) for _ in range(3))
    halves = [torch.zeros(1, 2, 16, 8, dtype=torch.bfloat16) for _ in range(2)]
    wholes = [torch.zeros(1, 2, 16, 8) for _ in range(2)]
    numbers = torch.tensor([1, 6, 12, 21, 23, 0, 0, 3, 0, 1, 3, -1, 0, 0, 1, 1, 0, 2, 2, 0, 3, 4, 3, 4, 5, 6])
    mask = torch.zeros(2, dtype=torch.uint8)
    rounded = key.bfloat16().float(), value.bfloat16().float()
    outputs = [
        torch.ops.unspool.attend(query, *rounded, *pool, numbers, mask, None, 0.3, 0.0) for pool in (halves, wholes)
    ]
    torch.testing.assert_close(*outputs)
    assert torch.equal(halves[0].float(), wholes[0])


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_runs_by_the_kernel_as_it_does_without(arch: str) -> None:
    tokens = np.random.default_rng(0).integers(3, 64, 26)
    slots = np.concatenate([np.arange(20, 32), np.arange(0, 14)])

    def logits(compiled: bool) -> Tensor:
        runner = HuggingFaceRunner(tiny_model(arch, torch.float32), compiled=compiled)
        assert runner.compiled == (["attention"] if compiled else [])
        runner.allocate(40)
        found = []
        for start, stop in ((0, 7), (7, 24), (24, 25), (25, 26)):
            places = np.arange(start, stop)
            spans = [Span(0, stop - start, slots[:stop])]
            found.append(runner.forward(Batch(tokens[places], places, slots[places], spans, places - start)).logits)
        return torch.cat(found)

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-3, atol=1e-4)


def test_nan_in_one_request_stays_there() -> None:
    case = Case(3, Layer(2, 16, 16, torch.float32), 4)
    case.spans, case.columns, case.tokens, case.size = [], [], 0, 400
    case.chain(np.arange(0, 100), 1)
    case.chain(np.arange(200, 330), 3)
    pool = Pool([case.layer], 400, torch.device("cpu"))
    pool.places[0][0].keys[..., :100, :] = torch.nan
    slots = np.array([99, 327, 328, 329])
    some = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    plan = TablePlan(pool, Batch(slots, slots % 200, slots, case.spans, slots))
    found = plan.attend(Call(nn.Module(), some, some[:, :2], some[:, 2:], None, {}))
    assert found[:, :1].isnan().all()
    assert not found[:, 1:].isnan().any()


def test_without_a_compiler_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler"):
        kernel.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ModelError, match="could not be built"):
        kernel.build()
    assert not list((tmp_path / "unspool" / "compiled").iterdir())
