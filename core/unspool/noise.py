"""Noise as a pure function: what a request draws depends on its seed and on where it draws, and on nothing else.

An integer hash in tensor operations, so every device gives the same bits and no generator has a state that a neighbour,
a preemption or a draft could move. The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood 2014); for
Gumbel noise a cheaper 32-bit mix (Ettinger's `triple32`, Wellons 2018) runs over the vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.kernels import by_kernel
from unspool.rank import argmax


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


_GAMMA = _signed(0x9E3779B97F4A7C15, 64)
_MIX_1 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_2 = _signed(0x94D049BB133111EB, 64)
_MIX32_1 = _signed(0xED5AD4BB, 32)
_MIX32_2 = _signed(0xAC4C1B51, 32)
_MIX32_3 = _signed(0x31848BAB, 32)


def purpose_key(purpose: str) -> int:
    """Hash a purpose to a signed 64-bit key."""
    return _signed(int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little"), 64)


def derive_seed(run_seed: int, request_id: str) -> int:
    """Derive a request's seed from the run's seed and the request's id: 0 <= seed < 2**63."""
    digest = hashlib.blake2b(f"{run_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def key(seed: Tensor, stream: Tensor, position: Tensor, purpose: int) -> Tensor:
    """Hash (seed, stream, position, purpose), each `[rows]` int64, to `[rows]` int64."""
    mixed = _mix64(seed + purpose)
    mixed = _mix64(mixed + (stream + 1) * _GAMMA)
    return _mix64(mixed + (position + 1) * _GAMMA)


def uniform(keys: Tensor) -> Tensor:
    """Map `[rows]` keys to float64 in (0, 1): 2**52 equidistant values, never 0 or 1."""
    return (_shift(keys, 12, 64).to(torch.float64) + 0.5) * 2.0**-52  # of 53 bits the half would round up to 1


def gumbel(keys: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Map `[rows]` keys to standard Gumbel noise `[rows, vocab]`, one independent value a token.

    With v uniform in (0, 1) of 31 bits, -log(-log1p(-v)): the upper tail, which decides who wins, keeps full precision.
    """
    if keys.device.type == "cpu":
        return _gumbel_by_rows(keys, vocab, dtype)
    token = torch.arange(vocab, device=keys.device, dtype=torch.int32)
    low, high = _halves(keys)
    return _to_gumbel(_whole(_mix32(_mix32(token ^ low.unsqueeze(1)) ^ high.unsqueeze(1))).to(dtype))


def gumbel_at(keys: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the noise of single tokens: `[n]` keys and tokens to the `[n]` values that `gumbel` has for them."""
    low, high = _halves(keys)
    return _to_gumbel(_whole(_mix32(_mix32(tokens.to(torch.int32) ^ low) ^ high)).to(dtype))


def draw(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw a token from each distribution `[rows, vocab]` with the Gumbel noise of `[rows]` keys.

    The same as `(logits + gumbel(keys, ...)).argmax(-1)`, but only tokens that may win get noise. On a CPU a model's
    runner brings a kernel that finds those (`huggingface/draws.cpp`); without it they are all that are possible.

    Returns:
        `[rows]` int64. Of a row without a possible token, any.
    """
    rows, vocab = logits.shape
    operator = by_kernel("contenders", logits, torch.float32)
    if operator is not None:
        places: Tensor = operator(logits, keys)
        return places % vocab if len(places) == rows else _draw_among(places, logits, keys)
    if logits.device.type == "cpu":  # elsewhere counting them would be waiting for them
        possible = logits.numpy() > -np.inf
        if np.count_nonzero(possible) * _FEW < rows * vocab:
            return _draw_among(torch.from_numpy(np.flatnonzero(possible)), logits, keys)
    return argmax(logits + gumbel(keys, vocab, logits.dtype))


def _draw_among(places: Tensor, logits: Tensor, keys: Tensor) -> Tensor:
    """Draw from tokens at `[n]` places of the flattened `logits`, in rising order."""
    row, token = places // logits.shape[1], places % logits.shape[1]
    counts = torch.bincount(row, minlength=len(logits))
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape = len(logits), max(1, int(counts.max()))
    noisy, tokens = logits.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64)
    noisy[row, column] = logits[row, token] + gumbel_at(keys[row], token, logits.dtype)
    tokens[row, column] = token
    return tokens.gather(1, argmax(noisy).unsqueeze(1)).squeeze(1)


_FEW = 16
"""Picking single tokens out of many costs about so many times what each costs among all."""


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys.to(torch.int32), _shift(keys, 32, 64).to(torch.int32)


def _whole(mixed: Tensor) -> Tensor:
    """Map int32 to 31 bits in its order, from 0 on: of numbers next to 0 float32 keeps all."""
    return (mixed >> 1) + (1 << 30)


def _to_gumbel(whole: Tensor) -> Tensor:
    """Map whole numbers in [0, 2**31), held as floats, to Gumbel noise, in place."""
    # To (0, 1); float32 rounds the top to 1, where log1p would be -inf.
    v = whole.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


_AT_ONCE = 1 << 16
"""Tokens of whose noise the hashes stay in the processor's cache."""


def _gumbel_by_rows(keys: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Give the same on a CPU: some rows at a time, in arrays that stay in the processor's cache."""
    noise = torch.empty(len(keys), vocab, dtype=dtype)
    token, halves = np.arange(vocab, dtype=np.uint32), keys.numpy().view(np.uint64)[:, np.newaxis]
    low, high = (halves & 0xFFFFFFFF).astype(np.uint32), (halves >> 32).astype(np.uint32)
    rows = min(len(keys), max(1, _AT_ONCE // vocab))
    values, room = np.empty((2, rows, vocab), dtype=np.uint32)
    for begin in range(0, len(keys), rows or 1):
        block = slice(begin, begin + rows)
        count = len(low[block])
        value, shifted = values[:count], room[:count]
        np.bitwise_xor(token, low[block], out=value)
        _mix32_into(value, shifted)
        np.bitwise_xor(value, high[block], out=value)
        _mix32_into(value, shifted)
        np.right_shift(np.bitwise_xor(value, np.uint32(1 << 31), out=value), np.uint32(1), out=value)
        _to_gumbel(noise[block].copy_(torch.from_numpy(value.view(np.int32))))
    return noise


def _mix32_into(value: NDArray[np.uint32], shifted: NDArray[np.uint32]) -> None:
    for by, factor in ((17, _MIX32_1), (11, _MIX32_2), (15, _MIX32_3), (14, None)):
        np.right_shift(value, np.uint32(by), out=shifted)
        np.bitwise_xor(value, shifted, out=value)
        if factor is not None:
            np.multiply(value, np.uint32(factor & 0xFFFFFFFF), out=value)


def _shift(value: Tensor, by: int, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (value >> by) & ((1 << (bits - by)) - 1)


def _mix64(value: Tensor) -> Tensor:
    value = value + _GAMMA
    value = (value ^ _shift(value, 30, 64)) * _MIX_1
    value = (value ^ _shift(value, 27, 64)) * _MIX_2
    return value ^ _shift(value, 31, 64)


def _mix32(value: Tensor) -> Tensor:
    """Mix in place, int32."""
    value = value ^ _shift(value, 17, 32)
    value = value.mul_(_MIX32_1)
    value = value.bitwise_xor_(_shift(value, 11, 32)).mul_(_MIX32_2)
    value = value.bitwise_xor_(_shift(value, 15, 32)).mul_(_MIX32_3)
    return value.bitwise_xor_(_shift(value, 14, 32))
