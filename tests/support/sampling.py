"""Rows for the sampler, and the statistics that say whether its draws have the distribution they should have."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from kvbaton.engine.sampling import SamplingParams
from kvbaton.model.sampling_rows import SamplingRow

EOS = frozenset({2})


def logits_of(rows: int, seed: int = 5, vocab: int = 24) -> torch.Tensor:
    """Seeded logits [rows, vocab]."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def params(seed: int = 1, **changes: Any) -> SamplingParams:
    """Plain sampling, or what `changes` make of it."""
    return SamplingParams(**{"max_tokens": 1000, "seed": seed, "temperature": 1.0, **changes})


def row(
    seed: int = 1,
    position: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    constraint: Any = None,
    **changes: Any,
) -> SamplingRow:
    """A row of the sampler's batch."""
    return SamplingRow(params(seed, **changes), position, prompt, output, constraint)


def critical_value(degrees: int) -> float:
    """Of chi-squared, passed by chance once in a thousand (Wilson and Hilferty 1931)."""
    term = 2 / (9 * degrees)
    return float(degrees * (1 - term + 3.0902 * math.sqrt(term)) ** 3)


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, bins of fewer than five expected draws together."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    present = expected > 0
    observed, expected = observed[present], expected[present]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
