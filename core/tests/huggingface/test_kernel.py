"""The attention kernel gives what plain torch gives, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from unspool.errors import ModelError
from unspool.huggingface import HuggingFaceRunner, kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.plan import Plan
from unspool.huggingface.pool import Layer, Pool
from unspool.huggingface.table import TablePlan
from unspool.runner import Batch, Span
from unspool_testing.batches import RandomBatch, random_batches
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


@given(random_batches([*CLOSE]))
@settings(max_examples=150, deadline=None)
def test_the_kernel_gives_what_plain_torch_gives(case: RandomBatch) -> None:
    dtype = case.layer.dtype
    (one, one_pool), (two, two_pool) = case.outputs(TablePlan, dtype), case.outputs(Plan, torch.float32)
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
        case = RandomBatch(0, Layer(2, 16, 16, torch.float32), 4)
        case.clear(length)
        case.chain(np.arange(length), 40)
        (one, _), (two, _) = (case.outputs(plan, torch.float32) for plan in (TablePlan, Plan))
        torch.testing.assert_close(one, two, **CLOSE[torch.float32])
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
    rest = numbers, mask, None, None, None, 0.3, 0.0
    outputs = [torch.ops.unspool.attend(query, *rounded, *pool, *rest) for pool in (halves, wholes)]
    torch.testing.assert_close(*outputs)
    assert torch.equal(halves[0].float(), wholes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_scored_far_below_the_rest_weighs_nothing(dtype: torch.dtype) -> None:
    case = RandomBatch(0, Layer(2, 32, 32, dtype), 16)
    case.clear(200)
    case.chain(np.arange(100), 20)
    pool = Pool([case.layer], 200, torch.device("cpu"))
    keys, values = pool.places[0][0].keys, pool.places[0][0].values
    keys.zero_()
    keys[..., 0] = -3000.0 * torch.arange(200).fmod(3)  # a third of them scores 0, the others less than -500
    values[:] = torch.rand(200, generator=torch.Generator().manual_seed(0))[:, None]
    pool.positions[:100] = np.arange(100)
    slots = np.arange(80, 100)
    query = torch.zeros(1, 16, 20, 32, dtype=dtype)
    query[..., 0] = 1
    own = torch.zeros(1, 2, 20, 32, dtype=dtype)
    plan = TablePlan(pool, Batch(slots, slots, slots, case.spans, slots))
    found = plan.attend(Call(nn.Module(), query, own, own, None, {}))
    weighed = keys[0, 0, 0, :, 0] == 0
    for row, place in enumerate(slots):
        seen = values[0, 0, 0, : place + 1, 0][weighed[: place + 1]].float()
        torch.testing.assert_close(found[0, row].float(), seen.mean().expand(16, 32), rtol=1e-2, atol=1e-3)


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
    case = RandomBatch(3, Layer(2, 16, 16, torch.float32), 4)
    case.clear(400)
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


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 500])
def test_every_row_is_done_however_many_threads_share_them(count: int, threads: None) -> None:
    values = torch.randn(count, 70, generator=torch.Generator().manual_seed(count))
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        for _ in range(20):
            assert torch.equal(torch.ops.unspool.best(values, 3), values.topk(3).indices)
            copy, most = torch.ops.unspool.widened(values)
            assert torch.equal(copy, values)
            assert torch.equal(most, values.amax(dim=-1))


@pytest.mark.parametrize("width", [1, 7, 48, 500])
@pytest.mark.parametrize("depth", [8, 160, 576])
@pytest.mark.parametrize("integers", [False, True])
def test_products_are_right_and_each_row_is_its_own(integers: bool, depth: int, width: int, threads: None) -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    random = torch.Generator().manual_seed(width)
    weight, bias = (torch.randn(*shape, generator=random).bfloat16() for shape in ((width, depth), (width,)))
    scale = None
    if integers:
        weight = torch.randint(-127, 128, (width, depth), generator=random, dtype=torch.int8)
        scale = torch.rand(width, generator=random) / 127
    laid = torch.ops.unspool.lay_out(weight)
    for count in (*range(1, 20), 32, 33, 64, 67, 130, 200, 601, 1001):
        torch.set_num_threads(1 + count % 3)
        rows = torch.randn(count, depth, generator=random).bfloat16()
        exact = rows.double() @ (weight.double() * (1 if scale is None else scale.double()[:, None])).T
        for added in (None, bias):
            found = torch.ops.unspool.project(rows, laid, scale, added, width)
            expected = exact if added is None else exact + added.double()
            torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)
        clean = torch.ops.unspool.project(rows, laid, scale, bias, width)
        assert torch.equal(clean[:1], torch.ops.unspool.project(rows[:1], laid, scale, bias, width))
        rows[count // 2] = torch.nan
        spoilt = torch.ops.unspool.project(rows, laid, scale, bias, width).isnan()
        assert spoilt[count // 2].all()
        assert spoilt.sum() == width


@pytest.mark.parametrize("rare", [0, 1, 36, 37, 4000])
def test_weights_of_any_exponents_are_kept_exactly(rare: int) -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    random = torch.Generator().manual_seed(rare)
    depth, width = 576, 72
    weight = torch.rand(width, depth, generator=random).mul(0.99).add(1)  # never rounded to the next exponent
    weight *= 2.0 ** torch.arange(-7, 8).repeat(width * depth // 15 + 1)[: width * depth].view(width, depth)  # all 15
    weight *= torch.randint(-1, 2, (width, depth), generator=random)
    scattered = torch.randperm(32 * depth, generator=random)[:rare]  # in the second of three groups
    weight[32:64].view(-1)[scattered] = 2.0 ** torch.linspace(20, 120, rare)
    weight = weight.bfloat16()
    laid = torch.ops.unspool.lay_out(weight)
    assert laid.dtype == (torch.uint8 if rare <= depth // 16 else torch.bfloat16)
    for rows in (torch.eye(depth).bfloat16(), torch.randn(30, depth, generator=random).bfloat16()):
        expected = rows.double() @ weight.double().T
        for count in (1, 5, 12, len(rows)):
            found = torch.ops.unspool.project(rows[:count], laid, None, None, width)
            torch.testing.assert_close(found.double(), expected[:count], rtol=2**-8, atol=1e-4)
    found = torch.ops.unspool.project(torch.eye(depth).bfloat16(), laid, None, None, width)
    assert torch.equal(found, weight.T)


def test_every_integer_is_read_as_itself_wherever_it_stands() -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    depth, width = 256, 64
    weight = ((torch.arange(depth) + torch.arange(width)[:, None] * 5) % 255 - 127).to(torch.int8)
    laid, rows = torch.ops.unspool.lay_out(weight), torch.eye(depth).bfloat16()
    assert torch.equal(torch.ops.unspool.project(rows, laid, None, None, width), weight.T.bfloat16())
    by_one = [torch.ops.unspool.project(row[None], laid, None, None, width) for row in rows]
    assert torch.equal(torch.cat(by_one), weight.T.bfloat16())


@pytest.mark.parametrize("width", [32, 96, 320])
@pytest.mark.parametrize("kind", ["integers", "codes", "halves"])
def test_a_gated_product_is_silu_of_the_one_times_the_other_and_each_row_is_its_own(
    kind: str, width: int, threads: None
) -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    depth, scale = 160, None
    weight = torch.randn(2 * width, depth).bfloat16()
    if kind == "integers":
        weight = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
        scale = torch.rand(2 * width) / 127
    elif kind == "halves":
        weight *= 2.0 ** torch.randint(-20, 20, weight.shape)
        weight /= 2**12
    bias = torch.randn(2 * width).bfloat16()

    def by_turns(values: torch.Tensor) -> torch.Tensor:
        return values.view(2, -1, 32, *values.shape[1:]).transpose(0, 1).reshape(values.shape)

    laid, scales = torch.ops.unspool.lay_out(by_turns(weight)), None if scale is None else by_turns(scale)
    assert laid.dtype == {"integers": torch.int8, "codes": torch.uint8, "halves": torch.bfloat16}[kind]
    for count in (1, 2, 5, 12, 13, 24, 47, 48, 49, 100, 151, 153, 3401):  # threads get unequal shares of some
        torch.set_num_threads(1 + count % 3)
        rows = torch.randn(count, depth).bfloat16()
        both = rows.double() @ (weight.double() * (1 if scale is None else scale.double()[:, None])).T
        for added, turned in ((None, None), (bias, by_turns(bias))):
            gate, up = torch.split(both if added is None else both + added.double(), width, dim=1)
            found = torch.ops.unspool.project_gated(rows, laid, scales, turned, width)
            expected = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2e-3 * float(expected.abs().max()))
        one = torch.ops.unspool.project_gated(rows[-1:], laid, scales, by_turns(bias), width)
        assert torch.equal(found[-1:], one)
        rows[count // 2] = torch.nan
        spoilt = torch.ops.unspool.project_gated(rows, laid, scales, None, width).isnan()
        assert spoilt[count // 2].all() and spoilt.sum() == width
    with pytest.raises(RuntimeError, match=f"has {width} columns, not {width - 1}"):
        torch.ops.unspool.project_gated(rows, laid, scales, None, width - 1)


def test_a_gate_is_open_by_silu_of_any_number() -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    small = torch.logspace(-30, 2, 500)
    values = torch.cat([torch.linspace(-100, 100, 4001), small, -small, torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    rows = torch.nn.functional.pad(values.bfloat16()[:, None], (0, 7))
    weight, bias = torch.zeros(64, 8), torch.zeros(64)
    weight[:32, 0], bias[32:] = 1, 1
    laid = torch.ops.unspool.lay_out(weight.bfloat16())
    found = torch.ops.unspool.project_gated(rows, laid, None, bias.bfloat16(), 32)
    expected = torch.nn.functional.silu(rows[:, :1].double()).expand(-1, 32)
    # What is next to the least normal number may become zero.
    torch.testing.assert_close(found.double(), expected, rtol=1.05 * 2**-8, atol=1e-34)


def test_weights_that_cannot_be_laid_out_and_products_that_do_not_fit_are_refused() -> None:
    if not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    lay_out, project = torch.ops.unspool.lay_out, torch.ops.unspool.project
    with pytest.raises(RuntimeError, match="multiple of 8 numbers, not 12"):
        lay_out(torch.zeros(4, 12, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="takes bfloat16 or int8, not Float"):
        lay_out(torch.zeros(4, 16))
    with pytest.raises(RuntimeError, match="from -127 to 127, not -128"):
        lay_out(torch.full((4, 16), -128, dtype=torch.int8))
    laid = lay_out(torch.zeros(50, 16, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="rows of bfloat16, not Float"):
        project(torch.zeros(1, 16), laid, None, None, 50)
    with pytest.raises(RuntimeError, match="rows of 16 numbers for these weights, not 24"):
        project(torch.zeros(1, 24, dtype=torch.bfloat16), laid, None, None, 50)
    with pytest.raises(RuntimeError, match="has 64 columns, not 97"):
        project(torch.zeros(1, 16, dtype=torch.bfloat16), laid, None, None, 97)
    with pytest.raises(RuntimeError, match="a scale and a bias of 50 numbers"):
        project(torch.zeros(1, 16, dtype=torch.bfloat16), laid, None, torch.zeros(49, dtype=torch.bfloat16), 50)


def test_without_a_compiler_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler"):
        kernel.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ModelError, match="could not be built"):
        kernel.build()
    assert not list((tmp_path / "unspool" / "compiled").iterdir())
