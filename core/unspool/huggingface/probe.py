"""The probe: does the packed pass give what the model gives by itself? Asked of every model when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface import attention
from unspool.runner import Batch, Span

if TYPE_CHECKING:
    from unspool.huggingface.runner import HuggingFaceRunner

# Most that packed logits may differ, as a share of their own spread. Models compute their softmax and norms in float32
# whatever their dtype, hence the first. In half precision a model's own attention functions differ from each other by
# 0.15 on random tokens (SmolLM2 in bfloat16); a mistake in attention gives about 1.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 2e-3}
_HALF_TOLERANCE = 0.5
_WINDOW_TRIED = 256


def compare(runner: HuggingFaceRunner, model: PreTrainedModel) -> None:
    """Run two random sequences packed (scattered and consecutive slots, chunks, decoding) and each by itself.

    Raises:
        ModelError: the logits differ, with the numbers.
    """
    windows = [layer.window for layer in runner.layer_kinds if layer.window and layer.window <= _WINDOW_TRIED]
    limit = runner.window or 2**62
    long, short = min(max([11, *(window + 5 for window in windows)]), limit), min(6, limit)
    if long < 4:
        return
    random = np.random.default_rng(0)
    first, second = (random.integers(0, runner.vocab_size, length) for length in (long, short))
    expected = _alone(model, [first, second])
    packed = _packed(runner, first, second)
    for logits in (expected, packed):
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(f"its logits are not finite in {runner.dtype}; load it in another dtype")
    tolerance = allowed(runner.dtype)
    if (error := difference(packed, expected)) > tolerance:
        raise ModelError(
            f"packed, its logits differ from its own by {error:.2g} of their spread (allowed: {tolerance:g} in "
            f"{runner.dtype}), so it would be run wrongly"
        )
    if (error := difference(*_early(runner))) > tolerance:
        raise ModelError(f"its head gives other logits after one layer than a pass of one layer does ({error:.2g})")


def allowed(dtype: torch.dtype) -> float:
    """Give the most that logits of a dtype may differ."""
    return _TOLERANCES.get(dtype, _HALF_TOLERANCE)


def difference(logits: Tensor, expected: Tensor) -> float:
    """Say how far logits are from those expected, as a share of their spread."""
    logits, expected = logits.double(), expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((logits - expected).square().mean().sqrt() / spread.clamp_min(1e-9))


def _alone(model: PreTrainedModel, sequences: list[NDArray[np.int64]]) -> Tensor:
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            ids = [torch.as_tensor(sequence, device=model.device)[None] for sequence in sequences]
            return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in ids])
    finally:
        model.set_attn_implementation(attention.NAME)


def _packed(runner: HuggingFaceRunner, first: NDArray[np.int64], second: NDArray[np.int64]) -> Tensor:
    """Prefill one sequence in two chunks and a step in slots from the back, the other in one chunk and a step."""
    long, short = len(first), len(second)
    runner.allocate(long + short)
    slots = np.arange(long + short)[::-1][:long].copy()
    cut = long // 2

    def batch(start: int, stop: int, begin: int, end: int) -> Batch:
        spans = [Span(0, stop - start, slots[:stop])]
        if end > begin:
            spans.append(Span(stop - start, end - begin, slice(0, end)))
        return Batch(
            token_ids=np.concatenate([first[start:stop], second[begin:end]]),
            positions=np.concatenate([np.arange(start, stop), np.arange(begin, end)]),
            slots=np.concatenate([slots[start:stop], np.arange(begin, end)]),
            spans=spans,
            wanted=np.arange(stop - start + end - begin),
        )

    one = runner.forward(batch(0, cut, 0, short - 1)).logits
    two = runner.forward(batch(cut, long - 1, short - 1, short)).logits
    three = runner.forward(batch(long - 1, long, short, short)).logits
    return torch.cat([one[:cut], two[: long - 1 - cut], three, one[cut:], two[long - 1 - cut :]])


def _early(runner: HuggingFaceRunner) -> tuple[Tensor, Tensor]:
    """Give what the head makes of the hidden state after one layer, and what a pass of one layer gives."""
    token, span = np.zeros(1, dtype=np.int64), Span(0, 1, slice(0, 1))
    deep = runner.forward(Batch(token, token, token, [span], token, hidden=(1,)))
    shallow = runner.forward(Batch(token, token, token, [span], token, layers=1))
    early = deep.hidden[1] if runner.layers > 1 else None
    return (shallow.logits if early is None else runner.head(early)), shallow.logits
