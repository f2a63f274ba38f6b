"""Sampling parameters are checked one by one, and the field that is wrong is named."""

import math
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import (
    MAX_CHOICES,
    MAX_LISTED_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_STRUCTURED_OUTPUT_BYTES,
    SamplingParams,
    StructuredOutput,
    check_token_ids_in_vocabulary,
)

VALID: dict[str, Any] = {"max_tokens": 1, "seed": 0}
NO_NUMBERS = (math.nan, math.inf, -math.inf)
MANY = frozenset(range(MAX_LISTED_TOKEN_IDS))

WRONG: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1)),
    *(("seed", value) for value in (-1, MAX_SEED + 1)),
    *(("temperature", value) for value in (-0.1, 100.1, *NO_NUMBERS)),
    *(("top_p", value) for value in (0.0, -0.5, 1.0001, *NO_NUMBERS)),
    *(("min_p", value) for value in (-0.1, 1.1, *NO_NUMBERS)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, *NO_NUMBERS)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, *NO_NUMBERS)),
    *(("repetition_penalty", value) for value in (0.0, -1.0, 10.1, *NO_NUMBERS)),
    *(("logprobs", value) for value in (-1, MAX_LOGPROBS + 1)),
    *(("prompt_logprobs", value) for value in (-1, MAX_LOGPROBS + 1)),
    *(("min_tokens", value) for value in (-1, 2)),
    ("top_k", -1),
    ("stop_token_ids", frozenset(range(MAX_STOP_TOKEN_IDS + 1))),
    ("allowed_token_ids", MANY | {MAX_LISTED_TOKEN_IDS}),
    ("banned_token_ids", MANY | {MAX_LISTED_TOKEN_IDS}),
    ("logit_bias", dict.fromkeys(range(MAX_LISTED_TOKEN_IDS + 1), 1.0)),
    ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
]

WRONG_ITEMS: list[tuple[str, Any, str]] = [
    *(("logit_bias", {3: 1.0, 17: value}, "logit_bias[17]") for value in (-100.1, 100.1, *NO_NUMBERS)),
    ("stop", ("a", "b", "c", ""), "stop[3]"),
    ("stop", ("a", "b" * (MAX_STOP_CHARS + 1)), "stop[1]"),
]

BOUNDARIES: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (1, 10**9)),
    *(("seed", value) for value in (0, MAX_SEED)),
    *(("temperature", value) for value in (0.0, 5e-324, 100.0)),
    *(("top_p", value) for value in (5e-324, 1.0)),
    *(("top_k", value) for value in (0, 1, 2**32 - 1)),
    *(("min_p", value) for value in (0.0, 1.0)),
    *(("presence_penalty", value) for value in (-2.0, 2.0)),
    *(("frequency_penalty", value) for value in (-2.0, 2.0)),
    *(("repetition_penalty", value) for value in (5e-324, 10.0)),
    *(("logprobs", value) for value in (None, 0, MAX_LOGPROBS)),
    *(("prompt_logprobs", value) for value in (None, 0, MAX_LOGPROBS)),
    *(("min_tokens", value) for value in (0, 1)),
    *(("stop_token_ids", value) for value in (frozenset(), frozenset(range(MAX_STOP_TOKEN_IDS)))),
    *(("allowed_token_ids", value) for value in (frozenset(), MANY)),
    *(("banned_token_ids", value) for value in (frozenset(), MANY)),
    *(("logit_bias", value) for value in ({}, {5: -100.0, 6: 100.0}, dict.fromkeys(MANY, 0.0))),
    *(("stop", value) for value in ((), ("é" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS)),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{**VALID, field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("field", "value", "named"), WRONG_ITEMS)
def test_a_wrong_item_is_named(field: str, value: Any, named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{**VALID, field: value})
    assert caught.value.field == named
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("field", "value"), BOUNDARIES)
def test_the_last_allowed_value_is_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{**VALID, field: value}), field) == value


@pytest.mark.parametrize(
    ("temperature", "top_k", "greedy"),
    [(0.0, 0, True), (0.0, 5, True), (1.0, 1, True), (1.0, 0, False), (0.1, 2, False)],
)
def test_greedy_is_no_temperature_or_one_candidate(temperature: float, top_k: int, greedy: bool) -> None:
    assert SamplingParams(**VALID, temperature=temperature, top_k=top_k).is_greedy is greedy


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"presence_penalty": 1.0},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 0.5}},
        {"allowed_token_ids": frozenset({1})},
        {"banned_token_ids": frozenset({1})},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"structured_output": StructuredOutput("json_object")},
    ],
)
def test_whoever_asks_for_more_than_the_argmax_is_not_plain(changes: dict[str, Any]) -> None:
    assert SamplingParams(**VALID).is_plain
    assert SamplingParams(**VALID, top_p=0.5, top_k=3, min_p=0.5, prompt_logprobs=5, stop=("x",)).is_plain
    assert not SamplingParams(**VALID, **changes).is_plain


def test_what_ends_a_sequence() -> None:
    eos, stops = frozenset({1, 2}), frozenset({2, 3})
    assert SamplingParams(**VALID, stop_token_ids=stops).ending_token_ids(eos) == {1, 2, 3}
    assert SamplingParams(**VALID, stop_token_ids=stops, ignore_eos=True).ending_token_ids(eos) == {2, 3}


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
def test_what_would_go_on_after_a_finished_form_is_refused(field: str) -> None:
    changes: dict[str, Any] = {field: 1}
    form = StructuredOutput("regex", "a+")
    SamplingParams(**VALID, structured_output=form)
    with pytest.raises(InvalidArgumentError, match="cannot be combined with structured_output") as caught:
        SamplingParams(**VALID, structured_output=form, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("kind", "text", "choices", "field"),
    [
        ("json_schema", "", (), "json_schema"),
        ("regex", "", (), "regex"),
        ("grammar", "", (), "grammar"),
        ("choice", "", (), "choice.texts"),
        ("choice", "", ("a", ""), "choice.texts[1]"),
        ("choice", "", ("a",) * (MAX_CHOICES + 1), "choice.texts"),
        ("choice", "", ("a" * MAX_STRUCTURED_OUTPUT_BYTES, "b"), "choice.texts"),
        ("json_schema", "{" * (1 << 20), (), "json_schema"),
        ("regex", "é" * (MAX_STRUCTURED_OUTPUT_BYTES // 2 + 1), (), "regex"),
    ],
)
def test_a_form_that_is_empty_or_too_long_is_refused(kind: Any, text: str, choices: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        StructuredOutput(kind, text, choices)
    assert caught.value.field == f"structured_output.{field}"
    assert len(str(caught.value)) < 200


def test_the_longest_form_is_allowed() -> None:
    StructuredOutput("json_schema", "x" * MAX_STRUCTURED_OUTPUT_BYTES)
    StructuredOutput("choice", choices=("é" * (MAX_STRUCTURED_OUTPUT_BYTES // 2 // MAX_CHOICES),) * MAX_CHOICES)
    StructuredOutput("json_object")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stop_token_ids": frozenset({3, 10})}, "stop_token_ids"),
        ({"allowed_token_ids": frozenset({3, 10})}, "allowed_token_ids"),
        ({"banned_token_ids": frozenset({3, 10})}, "banned_token_ids"),
        ({"logit_bias": {3: 1.0, 10: 1.0}}, "logit_bias[10]"),
    ],
)
def test_a_token_id_that_the_model_does_not_have_is_refused(changes: dict[str, Any], field: str) -> None:
    params = SamplingParams(**VALID, **changes)
    check_token_ids_in_vocabulary(params, 11)
    with pytest.raises(InvalidArgumentError, match="10 is not below 10") as caught:
        check_token_ids_in_vocabulary(params, 10)
    assert caught.value.field == field


SOME = frozenset({3, 4})
ALL_BUT_SOME = frozenset(range(10)) - SOME


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"allowed_token_ids": SOME, "banned_token_ids": SOME | {5}}, "allowed_token_ids"),
        ({"allowed_token_ids": SOME, "stop_token_ids": SOME, "min_tokens": 1}, "allowed_token_ids"),
        (
            {"allowed_token_ids": SOME, "banned_token_ids": {3}, "stop_token_ids": {4}, "min_tokens": 1},
            "allowed_token_ids",
        ),
        ({"banned_token_ids": ALL_BUT_SOME | SOME}, "banned_token_ids"),
        ({"banned_token_ids": ALL_BUT_SOME, "stop_token_ids": SOME, "min_tokens": 1}, "banned_token_ids"),
    ],
)
def test_a_request_that_no_token_fits_is_refused(changes: dict[str, Any], field: str) -> None:
    changes = {name: frozenset(value) if isinstance(value, set) else value for name, value in changes.items()}
    with pytest.raises(InvalidArgumentError, match="no token is left") as caught:
        check_token_ids_in_vocabulary(SamplingParams(**VALID, **changes), 10)
    assert caught.value.field == field


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_eos_counts_among_the_endings_unless_it_is_ignored(ignore_eos: bool) -> None:
    params = SamplingParams(**VALID, allowed_token_ids=SOME, min_tokens=1, ignore_eos=ignore_eos)
    check_token_ids_in_vocabulary(params, 10)
    if ignore_eos:
        check_token_ids_in_vocabulary(params, 10, SOME)
        return
    with pytest.raises(InvalidArgumentError, match="allowed_token_ids: no token is left"):
        check_token_ids_in_vocabulary(params, 10, SOME)
