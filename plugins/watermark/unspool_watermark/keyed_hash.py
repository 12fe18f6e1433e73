"""A hash of tokens under a key: what a watermark draws for a token after its context, and its detector draws again.

    state_0 = secret;   state_i = mix(state_(i-1) + (token_i + 1) * golden ratio)          (modulo 2**64)

So a context seeds a generator, and the draw of token t is that generator's output number t: SplitMix64 (Steele, Lea,
Flood 2014). It is integer arithmetic in tensor operations: the same bits on every device, whatever the vocabulary's
size. It is the form in which watermarks live in texts, so it may never change; a test holds its values. It is no
cryptographic hash: it is meant to be random to a reader, not to stand up to a cryptanalyst.
"""

from __future__ import annotations

from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def fold(state: Tensor | int, tokens: Tensor) -> Tensor:
    """Hash one token more into a state: both int64, of shapes that broadcast."""
    mixed = state + (tokens + 1) * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shifted(mixed, 27)) * _MIX_2
    return mixed ^ _shifted(mixed, 31)


def draws(secret: Tensor | int, context: Tensor, tokens: Tensor) -> Tensor:
    """Draw 64 fair bits for each token after its context.

    Args:
        secret: one number, or `[n]`.
        context: `[n, width]` token ids, the last one last.
        tokens: `[n, k]`, or `[1, k]` for the same in all rows.

    Returns:
        `[n, k]` int64.
    """
    state = context.new_zeros(len(context)) + secret
    for column in context.unbind(dim=-1):
        state = fold(state, column)
    return fold(state.unsqueeze(-1), tokens)


def below(drawn: Tensor, share: float) -> Tensor:
    """Tell which draws lie in the lowest `share` of all that there can be: bool of the same shape."""
    return _shifted(drawn, 11) < int(share * 2**53)


def _shifted(value: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)
