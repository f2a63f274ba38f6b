"""Sampling parameters are checked one by one, and the field that is wrong is named."""

import math
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import MAX_SEED, MAX_STOP_TOKEN_IDS, SamplingParams

VALID: dict[str, Any] = {"max_tokens": 1, "seed": 0}

WRONG: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1)),
    *(("seed", value) for value in (-1, MAX_SEED + 1)),
    *(("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf, -math.inf)),
    *(("top_p", value) for value in (0.0, -0.5, 1.0001, math.nan, math.inf, -math.inf)),
    ("top_k", -1),
    ("stop_token_ids", frozenset(range(MAX_STOP_TOKEN_IDS + 1))),
]

BOUNDARIES: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (1, 10**9)),
    *(("seed", value) for value in (0, MAX_SEED)),
    *(("temperature", value) for value in (0.0, 5e-324, 100.0)),
    *(("top_p", value) for value in (5e-324, 1.0)),
    *(("top_k", value) for value in (0, 1, 2**32 - 1)),
    *(("stop_token_ids", value) for value in (frozenset(), frozenset(range(MAX_STOP_TOKEN_IDS)))),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{**VALID, field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), BOUNDARIES)
def test_the_last_allowed_value_is_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{**VALID, field: value}), field) == value


@pytest.mark.parametrize(
    ("temperature", "top_k", "greedy"),
    [(0.0, 0, True), (0.0, 5, True), (1.0, 1, True), (1.0, 0, False), (0.1, 2, False)],
)
def test_greedy_is_no_temperature_or_one_candidate(temperature: float, top_k: int, greedy: bool) -> None:
    assert SamplingParams(**VALID, temperature=temperature, top_k=top_k).is_greedy is greedy
