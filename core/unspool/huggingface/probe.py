"""The probe: does the packed pass give what the model gives by itself? Asked of every model when it is loaded.

The answer for a model of transformers' own code is kept, as it costs half a second: the same weights, code and machine
are not asked twice.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface import attention, cache, kernel
from unspool.runner import Batch, Span

if TYPE_CHECKING:
    from unspool.huggingface.runner import HuggingFaceRunner

_log = logging.getLogger(__name__)

# Most that packed logits may differ, as a share of their own spread. Models compute their softmax and norms in float32
# whatever their dtype, hence the first. In half precision a model's own attention functions differ from each other by
# 0.15 on random tokens (SmolLM2 in bfloat16); a mistake in attention gives about 1.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 2e-3}
_HALF_TOLERANCE = 0.5
_WINDOW_TRIED = 256
_TRIED = 11
_TRIED_BY_GRAPHS = 40
"""So that a span is long enough for a large tile of `flex.py`."""


def compare_once(runner: HuggingFaceRunner, model: PreTrainedModel) -> None:
    """Compare a model with itself, unless it is known that it agreed.

    Raises:
        ModelError: the logits differ, with the numbers.
    """
    known = cache.folder("probed") / _name(runner, model)
    if known.is_file():
        return
    compare(runner, model)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    except OSError as error:
        _log.info("that the model agrees with itself is not kept, so it is asked each time: %s", error)


def _name(runner: HuggingFaceRunner, model: PreTrainedModel) -> str:
    """Name all that the answer depends on: the weights, all code that computes, and where."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getfile(type(model)))]
    device = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else kernel.machine()
    layers = sorted({type(module).__qualname__ for module in model.modules()})
    told = f"{runner.digest} {runner.dtype} {runner.compiled} {layers} {device} {kernel.path().name}"
    digest = hashlib.sha256(f"{told} {torch.__version__} {transformers.__version__}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def compare(runner: HuggingFaceRunner, model: PreTrainedModel) -> None:
    """Run two random sequences packed (scattered and consecutive slots, chunks, decoding) and each by itself.

    Between them the passes go every way that the runner has: where not all rows are wanted, where there are few rows,
    and where a span is long.

    Raises:
        ModelError: the logits differ, with the numbers.
    """
    windows = [layer.window for layer in runner.layer_kinds if layer.window and layer.window <= _WINDOW_TRIED]
    limit = runner.window or 2**62
    least = _TRIED_BY_GRAPHS if "graphs" in runner.compiled else _TRIED
    long, short = min(max([least, *(window + 5 for window in windows)]), limit), min(6, limit)
    if long < 4:
        return
    random = np.random.default_rng(0)
    first, second = (random.integers(0, runner.vocab_size, length) for length in (long, short))
    expected = _alone(model, [first, second])
    expected = torch.cat([expected[1:], expected[-2:]])
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
    """Prefill both in two chunks, one in slots from the back; then a step of each, and one of a token run again.

    Gives logits of every token of the first sequence but its first, of the second, and of the second's last two.
    """
    long, short = len(first), len(second)
    runner.allocate(long + short)
    slots = np.arange(long + short)[::-1][:long].copy(), np.arange(short)
    cut = long // 2

    def run(pieces: list[tuple[int, int, int]], unwanted: int = 0) -> Tensor:
        """Run pieces of sequences: which, its first token, and the one after its last."""
        spans: list[Span] = []
        parts = []
        for which, start, stop in pieces:
            places = np.arange(start, stop)
            context = slice(0, stop) if which else slots[0][:stop]
            spans.append(Span(sum(span.count for span in spans), len(places), context))
            parts.append(((first, second)[which][places], places, slots[which][places]))
        token_ids, positions, taken = (np.concatenate(column) for column in zip(*parts, strict=True))
        wanted = np.arange(unwanted, len(taken))
        return runner.forward(Batch(token_ids, positions, taken, spans, wanted)).logits

    one = run([(0, 0, cut), (1, 0, short - 2)], unwanted=1)
    two = run([(0, cut, long - 1), (1, short - 2, short)])
    three = run([(0, long - 1, long), (1, short - 2, short - 1), (1, short - 1, short)])
    kept, rest = cut - 1, long - 1 - cut
    return torch.cat([one[:kept], two[:rest], three[:1], one[kept:], two[rest:], three[1:]])


def _early(runner: HuggingFaceRunner) -> tuple[Tensor, Tensor]:
    """Give what the head makes of the hidden state after one layer, and what a pass of one layer gives."""
    token, span = np.zeros(1, dtype=np.int64), Span(0, 1, slice(0, 1))
    deep = runner.forward(Batch(token, token, token, [span], token, hidden=(1,)))
    shallow = runner.forward(Batch(token, token, token, [span], token, layers=1))
    early = deep.hidden[1] if runner.layers > 1 else None
    return (shallow.logits if early is None else runner.head(early)), shallow.logits
