"""FlexAttention gives what plain torch gives, whatever the batch looks like. Here it runs as plain torch itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from unspool.huggingface import flex, kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.flex import BLOCK, FlexPlan
from unspool.huggingface.plan import Plan
from unspool.huggingface.pool import Layer, Pool
from unspool.runner import Batch, Span
from unspool_testing.batches import RandomBatch, random_batches
from unspool_testing.compiling import plain_flex

CLOSE: dict[torch.dtype, Any] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    with plain_flex():
        yield


@given(random_batches([*CLOSE]))
@settings(max_examples=60, deadline=None)
def test_flex_attention_gives_what_plain_torch_gives(case: RandomBatch) -> None:
    dtype = case.layer.dtype
    (one, one_pool), (two, two_pool) = (case.outputs(plan, dtype) for plan in (FlexPlan.of, Plan))
    torch.testing.assert_close(one, two, **CLOSE[dtype])
    for (ours, _), (theirs, _) in zip(one_pool.places, two_pool.places, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_values_that_are_nan_or_infinite_spoil_those_who_see_them_and_nobody_else() -> None:
    pool = Pool([Layer(2, 16, 16, torch.float32)], BLOCK, CPU)
    slots = np.array([3, 9, 20, 30])  # of one block
    spans = [Span(at, 1, slots[at : at + 1]) for at in range(3)]
    spans.append(Span(3, 1, slots[[2, 3]]))
    some = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    value = some[:, 2:].clone()
    value[0, 1, 0, 5], value[0, 0, 2, 3] = torch.nan, torch.inf

    def attended(value: torch.Tensor) -> torch.Tensor:
        plan = FlexPlan.of(pool, Batch(slots, np.array([0, 0, 0, 1]), slots, spans, np.arange(4)))
        return plan.attend(Call(nn.Module(), some, some[:, :2], value, None, {}))[0]

    found = attended(value)
    assert found[[0, 2, 3]].isnan().flatten(1).any(1).all()
    torch.testing.assert_close(found[1], attended(some[:, 2:])[1])


def test_each_block_that_a_row_sees_is_listed_once_with_its_bits() -> None:
    context = np.concatenate([np.arange(60, 70), np.arange(300, 330), np.arange(5, 9)])
    own = context[-2:]
    seen = flex.runs(Pool([], 512, CPU), Batch(own, own, own, [Span(0, 2, context)], own), None)
    counts, entries = flex.marks(seen, np.array([[-1], [0], [1], [-1]]))
    assert counts.tolist() == [0, 2, 2, 0]
    assert entries[:, :3].tolist() == [[1, 0, 0], [1, 1, 2], [2, 0, 0], [2, 1, 2]]
    slots = {
        (int(tile), int(block) * BLOCK + bit)
        for tile, _, block, *words in entries
        for bit in range(BLOCK)
        if int(words[bit // 64]) >> bit % 64 & 1
    }
    assert slots == {(1, slot) for slot in context[:-1]} | {(2, slot) for slot in context}


def test_rows_stand_alone_or_in_large_tiles_and_tiles_are_padded_to_few_numbers() -> None:
    long = np.arange(BLOCK + 22)
    spans = [Span(0, 1, slice(200, 201)), Span(1, len(long), slice(0, len(long))), Span(151, 2, slice(201, 203))]
    slots = np.array([200, *long, 201, 202])
    pool = Pool([Layer(1, 8, 8, torch.float32)], 256, CPU)
    plan = FlexPlan.of(pool, Batch(slots, slots, slots, spans, slots))
    shapes = [read.sights[None].bits.shape for read in plan._reads]
    assert shapes == [(4, 1, 4), (2, BLOCK, 4)]


def test_a_pool_has_room_for_a_slot_of_nobody_and_whole_blocks() -> None:
    assert [flex.room(slots) for slots in (1, BLOCK - 1, BLOCK, BLOCK + 1)] == [BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK]


def test_what_a_gpu_cannot_do_is_told() -> None:
    assert flex.refusal([Layer(1, 64, 64, torch.bfloat16), Layer(1, 80, 16, torch.float32, 7)]) is None
    assert "float64" in str(flex.refusal([Layer(1, 64, 64, torch.float64)]))
    assert "at least 16" in str(flex.refusal([Layer(1, 64, 8, torch.float32)]))


def on(device: str, case: RandomBatch) -> Any:
    """Attend on a device, to the same numbers."""
    return case.outputs(FlexPlan.of, case.layer.dtype, torch.device(device))[0]


@pytest.mark.slow
@pytest.mark.skipif(kernel.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_it_gives_the_same(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch compiles it to C++: the code that is traced is the same as on a GPU."""
    case = RandomBatch(2, Layer(2, 32, 32, torch.float32, 100), 8, scaling=0.3, softcap=softcap)
    expected = on("cpu", case)
    with torch.inference_mode(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        monkeypatch.setattr(flex, "_attention", flex._compiled())
        torch.testing.assert_close(on("cpu", case), expected, **CLOSE[torch.float32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 8)])
def test_a_gpu_attends_as_a_cpu_does(seed: int, sinks: torch.Tensor | None) -> None:
    case = RandomBatch(seed, Layer(2, 64, 32, torch.float32, (None, 100)[seed % 2]), 8, s_aux=sinks)
    torch.testing.assert_close(on("cuda", case).cpu(), on("cpu", case), rtol=1e-3, atol=1e-3)
