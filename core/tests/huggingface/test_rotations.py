"""Rotary positions are left to attention where a model's are of the kind that it knows, and change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unspool.huggingface import HuggingFaceRunner, kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.package import KINDS, export
from unspool.huggingface.pool import Layer, Pool
from unspool.huggingface.rotations import leave_to_attention
from unspool.huggingface.table import Table, TablePlan
from unspool.runner import Batch, Span
from unspool_testing.batches import RandomBatch, random_batches
from unspool_testing.networks import tiny_model

pytestmark = pytest.mark.skipif(kernel.compiler() is None, reason="no C++ compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    kernel.build()
    assert kernel.available()


def crossed(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def whole(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return (x * cosines) + (crossed(x) * sines)


def in_part(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = cosines.shape[-1]
    return torch.cat([whole(x[..., :turned], cosines, sines), x[..., turned:]], dim=-1)


class Rotating:
    """A pass whose queries and keys are rotated: as they are read, or before."""

    def __init__(self, pool: Pool, batch: Batch, turned: int, as_read: bool) -> None:
        self.pool, self.plan, self.as_read = pool, TablePlan(pool, batch), as_read
        angles = torch.from_numpy(batch.positions)[:, None] / 3 ** torch.arange(turned // 2)
        self.cosines, self.sines = (f(angles).repeat(1, 2)[None, None] for f in (torch.cos, torch.sin))

    def attend(self, call: Call) -> Tensor:
        dtype, get = call.query.dtype, call.settings.get
        cosines, sines = self.cosines.to(dtype), self.sines.to(dtype)
        query, key = call.query, call.key
        if not self.as_read:  # rounded once, at the end
            query, key = (in_part(x.float(), cosines.float(), sines.float()).to(dtype) for x in (query, key))
        group, _ = self.pool.places[0]
        window = group.layer.window
        rotation = (cosines, sines) if self.as_read else (None, None)
        scaling = query.shape[-1] ** -0.5 if get("scaling") is None else get("scaling")
        numbers = get("s_aux"), *rotation, scaling, get("softcap") or 0.0
        pools = group.row_keys[0], group.row_values[0]
        attended: Tensor = torch.ops.unspool.attend(query, key, call.value, *pools, *self.plan.table(window), *numbers)
        return attended


@given(random_batches([*DTYPES]), st.data())
@settings(max_examples=100, deadline=None)
def test_rotated_as_they_are_read_queries_and_keys_are_what_they_were(case: RandomBatch, data: st.DataObject) -> None:
    turned = 2 * data.draw(st.integers(0, case.layer.key_width // 2))
    dtype = case.layer.dtype
    close: Any = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    (one, one_pool), (two, two_pool) = (
        case.outputs(functools.partial(Rotating, turned=turned, as_read=as_read), dtype) for as_read in (True, False)
    )
    torch.testing.assert_close(one, two, **close)
    torch.testing.assert_close(one_pool.places[0][0].keys, two_pool.places[0][0].keys, **close)


@pytest.mark.parametrize(
    ("cosines", "sines"),
    [
        (torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 4, 8)),
        (torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)),
        (torch.zeros(1, 1, 4, 10), torch.zeros(1, 1, 4, 10)),
        (torch.zeros(1, 1, 4, 7), torch.zeros(1, 1, 4, 7)),
        (torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)),
        (torch.zeros(1, 1, 4, 8), None),
    ],
)
def test_cosines_that_do_not_fit_are_refused(cosines: Tensor, sines: Tensor | None) -> None:
    some, pool = torch.zeros(1, 2, 4, 8), [torch.zeros(1, 2, 4, 8) for _ in range(2)]
    places = np.arange(4)
    batch = Batch(places, places, places, [Span(0, 4, slice(0, 4))], places)
    table = TablePlan(Pool([Layer(2, 8, 8, torch.float32)], 4, torch.device("cpu")), batch).table(None)
    with pytest.raises(RuntimeError, match=r"unspool::attend takes .*sines"):
        torch.ops.unspool.attend(some, some, some, *pool, *table, None, cosines, sines, 1.0, 0.0)


class Attention(nn.Module):
    """One layer's attention, with rotary positions of some kind."""

    def __init__(self, query: Rotate, key: Rotate) -> None:
        super().__init__()
        self.query, self.key = query, key

    def forward(self, x: Tensor, rotations: list[Tensor], pool: list[Tensor], table: list[Tensor]) -> Tensor:
        query, key = self.query(x, *rotations), self.key(x, *rotations)
        attended: Tensor = torch.ops.unspool.attend(query, key, x, *pool, *Table(*table), *[None] * 3, 0.3, 0.0)
        return attended


def given_pass(turned: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 8, generator=generator)
    rotations = [torch.randn(1, 1, 5, turned, generator=generator) for _ in range(2)]
    places = np.arange(5)
    batch = Batch(places, places, places, [Span(0, 5, slice(0, 5))], places)
    pool = Pool([Layer(2, 8, 8, torch.float32)], 5, torch.device("cpu"))
    return x, rotations, pool.rows, list(TablePlan(pool, batch).table(None))


def other_way_round(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return sines * crossed(x) + cosines * x


def in_all(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return torch.cat([whole(x[..., : cosines.shape[-1]], cosines, sines), x[..., x.shape[-1] :]], dim=-1)


def backwards(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosines + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sines


def by_neighbours(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return x * cosines + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sines


def of_something_else(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return (2 * x) * cosines + crossed(x) * sines


def rotated_twice(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return whole(x, sines, cosines)


def behind(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = cosines.shape[-1]
    return torch.cat([x[..., turned:], whole(x[..., :turned], cosines, sines)], dim=-1)


def with_a_gap(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = cosines.shape[-1]
    return torch.cat([whole(x[..., :turned], cosines, sines), x[..., :turned]], dim=-1)


def not_at_all(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return x * cosines


@pytest.mark.parametrize(
    ("query", "key", "turned", "left"),
    [
        (whole, whole, 8, True),
        (other_way_round, whole, 8, True),
        (in_part, in_part, 6, True),
        (in_all, in_all, 8, True),
        (whole, rotated_twice, 8, False),
        (whole, not_at_all, 8, False),
        (backwards, backwards, 8, False),
        (by_neighbours, by_neighbours, 8, False),
        (of_something_else, of_something_else, 8, False),
        (behind, behind, 4, False),
        (with_a_gap, with_a_gap, 4, False),
    ],
)
@torch.no_grad()
def test_only_what_attention_would_do_is_left_to_it(query: Rotate, key: Rotate, turned: int, left: bool) -> None:
    inputs = given_pass(turned)
    program = torch.export.export(Attention(query, key), inputs, strict=False)
    before = program.module()(*inputs)
    operators = [node.target for node in program.graph.nodes]
    assert leave_to_attention(program.graph) == left
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(*inputs), before)
    rotates = torch.ops.aten.mul.Tensor in [node.target for node in program.graph.nodes]
    assert rotates != left and torch.ops.aten.mul.Tensor in operators


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "phi3", "gpt_neox", "gpt2"])
def test_models_of_transformers_leave_theirs_to_it(arch: str) -> None:
    subject = HuggingFaceRunner(tiny_model(arch, torch.float32), compiled=False).subject
    attends = [node for node in export(subject, KINDS[1], torch.float32).graph.nodes if "attend" in str(node.target)]
    places = {argument.name: at for at, argument in enumerate(torch.ops.unspool.attend.default._schema.arguments)}
    assert sum(node.args[places["cosines"]] is not None for node in attends) == (0 if arch == "gpt2" else 3)
