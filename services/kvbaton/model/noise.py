"""Noise that is a function and not a stream.

A draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, "A* Sampling"): argmax(logits / T + g) has exactly
the softmax's distribution when every g is an independent Gumbel variate. Here g depends on (seed, position, token id)
alone, so the token at a position is the same in any batch, on any worker, however often the request was resumed. The
bits come from SplitMix64's finaliser (Steele, Lea and Flood 2014), which passes BigCrush on a plain counter.
"""

import torch


def signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch has no unsigned arithmetic, and wraps on overflow as we need."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel variates [n, k], float32, for `seeds` and `positions` [n] and `token_ids` [n or 1, k], all int64."""
    rows = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    noise = uniform(_mix((token_ids + 1) * _GOLDEN + rows[:, None]))
    # In place: on a CPU, allocating would cost more than computing.
    return noise.log_().neg_().log_().neg_().float()


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Float64 in (0, 1) from 64 random bits (int64): never 0 and never 1, so that Gumbel's logarithms are finite.

    52 of the bits, centred in their cells; with 53 the half would be rounded away, and the last cell become 1.
    """
    return _shifted_right(bits, 12, torch.empty_like(bits)).double().add_(0.5).mul_(2.0**-52)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, in place."""
    scratch = torch.empty_like(value)
    value.bitwise_xor_(_shifted_right(value, 30, scratch)).mul_(_MIX_1)
    value.bitwise_xor_(_shifted_right(value, 27, scratch)).mul_(_MIX_2)
    return value.bitwise_xor_(_shifted_right(value, 31, scratch))


def _shifted_right(value: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """The shift of unsigned numbers."""
    return torch.bitwise_right_shift(value, bits, out=out).bitwise_and_(2 ** (64 - bits) - 1)
