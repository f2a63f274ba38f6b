"""Draws have the distribution that the parameters mean: chi-squared against exact probabilities, seeds fixed."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from kvbaton.model.sampler import sample
from kvbaton.model.sampling_rows import SamplingRow
from support.sampling import EOS, chi_squared, critical_value, logits_of, row

VOCAB = 24
NUM = 10_000
PROMPT, OUTPUT = [1, 2, 3, 3], [3, 5, 5, 7]


def exact(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """The distribution that the parameters mean, token by token in plain float64."""
    counts = Counter(OUTPUT)
    values = logits.double().tolist()
    for token in range(len(values)):
        if token in params.get("banned_token_ids", ()):
            values[token] = -math.inf
        values[token] += params.get("logit_bias", {}).get(token, 0)
        if token in {*PROMPT, *OUTPUT}:
            factor = params.get("repetition_penalty", 1)
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.get("presence_penalty", 0) * (counts[token] > 0)
        values[token] -= params.get("frequency_penalty", 0) * counts[token]
    weights = [math.exp((value - max(values)) / params.get("temperature", 1)) for value in values]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: params.get("top_k", 0) or None]
    total, before = sum(weights[token] for token in ranked), 0.0
    nucleus: list[int] = []
    for token in ranked:
        if before >= params.get("top_p", 1) and nucleus:
            break
        nucleus.append(token)
        before += weights[token] / total
    nucleus = [token for token in nucleus if weights[token] >= params.get("min_p", 0)]
    result = torch.zeros(len(weights), dtype=torch.float64)
    result[nucleus] = torch.tensor([weights[token] for token in nucleus], dtype=torch.float64)
    return result / result.sum()


def at_positions(one: SamplingRow) -> list[SamplingRow]:
    return [dataclasses.replace(one, position=position) for position in range(NUM)]


def counts_of(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    tokens = [token.token_id for token in sample(logits.expand(len(rows), -1), rows, EOS)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()


MEANINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 6},
    {"top_k": 1000},
    {"top_p": 0.97},
    {"min_p": 0.01},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 12, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.15},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.08},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {4: 3.0, 9: -2.0}, "banned_token_ids": frozenset({0, 20})},
    {
        "temperature": 1.7,
        "top_k": 14,
        "top_p": 0.95,
        "min_p": 0.03,
        "repetition_penalty": 1.3,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "logit_bias": {3: 1.5, 11: -1.0},
        "banned_token_ids": frozenset({8}),
    },
]


@pytest.mark.parametrize("across", ["positions", "seeds"])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_draws_have_the_exact_distribution(across: str, meaning: dict[str, Any]) -> None:
    logits = logits_of(1, seed=9)[0]
    history: dict[str, Any] = {"prompt": PROMPT, "output": OUTPUT}
    if across == "positions":
        rows = at_positions(row(1234, **history, **meaning))
    else:
        rows = [row(seed, 17, **history, **meaning) for seed in range(NUM)]
    counts, probabilities = counts_of(logits, rows), exact(logits, **meaning)
    assert float(counts[probabilities == 0].sum()) == 0
    statistic, degrees = chi_squared(counts, probabilities)
    assert degrees >= 2
    assert statistic < critical_value(degrees)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 1.1}, {"top_k": 12}, {"top_p": 0.99}, {"min_p": 0.02}, {"presence_penalty": -1.0}],
)
def test_the_chi_squared_test_can_fail(wrong: dict[str, Any]) -> None:
    logits = logits_of(1, seed=9)[0]
    counts = counts_of(logits, at_positions(row(1234, output=OUTPUT, **wrong)))
    statistic, degrees = chi_squared(counts, exact(logits))
    assert statistic > critical_value(degrees)


def test_neighbouring_positions_are_independent() -> None:
    sampled = sample(torch.zeros(NUM, 5), at_positions(row(77)), EOS)
    tokens = torch.tensor([token.token_id for token in sampled])
    pairs = torch.bincount(tokens[:-1] * 5 + tokens[1:], minlength=25).double()
    statistic, degrees = chi_squared(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))
    assert statistic < critical_value(degrees)
