"""Noise as a pure function: what a request draws depends on its seed and on where it draws, and on nothing else.

An integer hash in tensor operations, so every device gives the same bits and no generator has a state that a neighbour,
a preemption or a draft could move. The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood 2014); for
Gumbel noise a cheaper 32-bit mix (Ettinger's `triple32`, Wellons 2018) runs over the vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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

    With v uniform in (0, 1) of 32 bits, -log(-log1p(-v)): the upper tail, which decides who wins, keeps full precision.
    """
    token = torch.arange(vocab, device=keys.device, dtype=torch.int32)
    low, high = keys.to(torch.int32), _shift(keys, 32, 64).to(torch.int32)
    mixed = _mix32(_mix32(token.unsqueeze(0) ^ low.unsqueeze(1)) ^ high.unsqueeze(1))
    # int32 in [-2**31, 2**31) to (0, 1); float32 rounds the top to 1, where log1p would be -inf.
    v = mixed.to(dtype).add_(2.0**31 + 0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


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
