"""Masks of bits forbid what has none: by plain torch, and by the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unspool.huggingface import kernel
from unspool.masks import forbid


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 130, 1000])
def test_what_has_no_bit_is_forbidden_and_nothing_else_is_touched(size: int, spare: int, working: torch.dtype) -> None:
    chance = np.random.default_rng(size)
    allowed = chance.integers(2, size=(6, size)).astype(bool)
    allowed[1], allowed[2] = True, False
    allowed[3, :64] = True
    values = torch.from_numpy(chance.choice([-2.5, -0.0, 7.0, np.inf, -np.inf, np.nan], (6, size))).to(working)
    masks = np.packbits(allowed, axis=1, bitorder="little")
    masks = np.concatenate([masks, np.zeros((6, spare), dtype=np.uint8)], axis=1)
    found = values.clone()
    forbid(found, masks)
    expected = torch.where(torch.from_numpy(allowed), values, -torch.inf)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), "to the bit, NaN and -0.0 too"
    some = values.clone().T.contiguous().T  # of another layout
    forbid(some, masks)
    assert torch.equal(some.contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_what_does_not_belong_together_is_refused() -> None:
    if not kernel.available():
        pytest.skip("there is no kernel here")
    op, octets = torch.ops.unspool.forbid_, torch.zeros(2, 1, dtype=torch.uint8)
    for logits, masks in ((torch.ones(2, 9), octets), (torch.ones(3, 8), octets), (torch.ones(8, 2).T, octets)):
        with pytest.raises(RuntimeError, match="in one piece"):
            op(logits, masks)
    with pytest.raises(RuntimeError, match="takes float32 and uint8, not Double"):
        op(torch.ones(2, 8).double(), octets)
