"""Choosing the next token, for a whole batch, with noise that is a function and not a stream.

A draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, "A* Sampling"): argmax(logits / T + g) has exactly
the softmax's distribution when every g is an independent Gumbel variate. Here g depends on (seed, position, token id)
alone, so the token at a position is the same in any batch, on any worker, however often the request was resumed. The
bits come from SplitMix64's finaliser (Steele, Lea and Flood 2014), which passes BigCrush on a plain counter.
"""

from collections.abc import Sequence

import torch

from kvbaton.engine.sampling import SamplingParams


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch has no unsigned arithmetic, and wraps on overflow as we need."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


# Below this float32 has no normal numbers.
_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    kept: torch.Tensor = (value >> bits) & (2 ** (64 - bits) - 1)
    return kept


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Float64 in (0, 1) from 64 random bits (int64): never 0 and never 1, so that Gumbel's logarithms are finite.

    52 of the bits, centred in their cells; with 53 the half would be rounded away, and the last cell become 1.
    """
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel variates [n, vocab_size], float32, for `seeds` and `positions` [n] (int64)."""
    tokens = torch.arange(vocab_size, device=seeds.device)
    rows = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    bits = _mix(rows[:, None] + (tokens[None, :] + 1) * _GOLDEN)
    noise: torch.Tensor = -torch.log(-torch.log(uniform(bits))).float()
    return noise


def keep_top(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf all but each row's `top_k` [n] tokens (0: all), and then all but its `top_p` [n] nucleus (1: all).

    A token is in the nucleus while the probability of the tokens before it is below top_p, so one always is. Equal
    logits keep the order of their ids.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    limits_k, limits_p = (top_k > 0)[:, None], (top_p < 1)[:, None]
    ordered = ordered.masked_fill((rank >= top_k[:, None]) & limits_k, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # A sum of float32 may reach 1 before the last token: a row that asked for no nucleus must not lose its tail.
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0) & limits_p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token a row of `logits` [n, vocab], which will stand at `positions` in its sequence."""
    greedy = logits.argmax(-1)
    rows = [row for row, param in enumerate(params) if not param.is_greedy]
    if not rows:
        return [int(token) for token in greedy.tolist()]
    device = logits.device
    chosen = [params[row] for row in rows]
    # Relative to the largest, so that dividing by next to nothing makes the others -inf and never the largest inf.
    temperature = torch.tensor([max(p.temperature, _SMALLEST_TEMPERATURE) for p in chosen], device=device)
    scaled = logits[rows].float()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature[:, None]
    if any(p.top_k or p.top_p < 1 for p in chosen):
        top_k = torch.tensor([p.top_k for p in chosen], device=device)
        top_p = torch.tensor([p.top_p for p in chosen], device=device)
        scaled = keep_top(scaled, top_k, top_p)
    seeds = torch.tensor([_signed(p.seed) for p in chosen], device=device)
    at = torch.tensor([positions[row] for row in rows], device=device)
    greedy[rows] = (scaled + gumbel_noise(seeds, at, logits.shape[-1])).argmax(-1)
    return [int(token) for token in greedy.tolist()]
