"""Requests out: what the SDK sends for what it was told. No calls."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.client import _requests
from kvbaton.client._requests import build_prompt, build_request
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

PRESENT = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs"),
)


def test_text_tokens_and_messages_become_their_kind_of_prompt() -> None:
    assert build_prompt("hi") == pb.Prompt(text="hi")
    assert build_prompt("").WhichOneof("kind") == "text"
    for tokens in ([1, 2**32 - 1], (1, 2**32 - 1)):
        assert build_prompt(tokens) == pb.Prompt(tokens=pb.TokenPrompt(token_ids=b"\1\0\0\0\xff\xff\xff\xff"))
    assert build_prompt([]).WhichOneof("kind") == "tokens"
    message = {"role": "user", "content": "hi"}
    assert build_prompt([message]) == pb.Prompt(chat=pb.ChatPrompt(messages=[pb.ChatMessage(**message)]))


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        1.5,
        b"\1\0\0\0",
        {"role": "user", "content": "hi"},
        [True, False],
        [1, "two"],
        ["text"],
        [1.5],
        [{"role": "user"}],
        [{"role": "user", "content": "hi", "name": "x"}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "hi"}, 5],
    ],
)
def test_what_is_no_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError):
        build_prompt(prompt)


def test_whatever_counts_as_an_integer_is_a_token_and_iterators_are_read_once() -> None:
    expected = pb.Prompt(tokens=pb.TokenPrompt(token_ids=b"\5\0\0\0\6\0\0\0"))
    for tokens in (np.array([5, 6]), [np.int64(5), np.int32(6)], iter([5, 6])):
        assert build_prompt(tokens) == expected  # type: ignore[arg-type]


def test_an_option_that_does_not_exist_is_a_type_error() -> None:
    options: Any = {"max_token": 3, "stops": ["x"]}
    with pytest.raises(TypeError, match="no option max_token, stops"):
        build_request("hi", options)


@pytest.mark.parametrize(("timeout", "sent"), [(2.0, 2.0), (float("inf"), None), (1e12, None)])
def test_a_timeout_beyond_all_clocks_is_none(timeout: float, sent: float | None) -> None:
    assert _requests.deadline({"timeout": timeout}) == sent
    assert _requests.deadline({}) is None


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_outside_uint32_is_a_value_error(token: int) -> None:
    with pytest.raises(ValueError, match="token id"):
        build_prompt([1, token])


def test_what_is_left_out_stays_unset() -> None:
    request = build_request("hi", {})
    assert request == pb.GenerateRequest(prompt=pb.Prompt(text="hi"), sampling=types.SamplingParams())
    assert not any(request.sampling.HasField(name) for name in PRESENT)


@pytest.mark.parametrize("name", PRESENT)
def test_what_is_given_is_set_even_where_it_is_zero(name: Any) -> None:
    options: Any = {name: 0}
    sampling = build_request("hi", options).sampling
    assert [other for other in PRESENT if sampling.HasField(other)] == [name]
    assert getattr(sampling, name) == 0


FORMS = ("json_schema", "json_object", "regex", "choice", "grammar")


def test_every_option_of_a_request_has_its_field() -> None:
    sampling: dict[str, Any] = {
        "max_tokens": 3,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.25,
        "min_p": 0.125,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {5: -1.0, 6: 2.0},
        "allowed_token_ids": [5, 6],
        "banned_token_ids": [7],
        "seed": 2**64 - 1,
        "n": 3,
        "stop": ["a", "b"],
        "include_stop_in_output": True,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 0,
    }
    others: dict[str, Any] = {"model": "m", "request_id": "r", "priority": -5, "cache_salt": "s"}
    options: Any = {**sampling, **others, "timeout": 5.0, "metadata": [("a", "b")]}
    assert {*options, *FORMS} == set(_requests.GenerateOptions.__annotations__)
    expected = types.SamplingParams(**sampling)
    assert {field.name for field, _ in expected.ListFields()} == {
        field.name for field in types.SamplingParams.DESCRIPTOR.fields
    } - {"structured_output"}
    assert build_request("hi", options) == pb.GenerateRequest(prompt=pb.Prompt(text="hi"), sampling=expected, **others)


SCHEMA = {"type": "object", "title": "Grüße"}


@pytest.mark.parametrize(
    ("option", "value", "sent"),
    [
        ("json_schema", json.dumps(SCHEMA), {"json_schema": json.dumps(SCHEMA)}),
        ("json_schema", SCHEMA, {"json_schema": json.dumps(SCHEMA, ensure_ascii=False)}),
        ("json_object", True, {"json_object": True}),
        ("regex", "a+", {"regex": "a+"}),
        ("choice", ("yes", "no"), {"choice": {"texts": ["yes", "no"]}}),
        ("grammar", "root ::= x", {"grammar": "root ::= x"}),
        # What is wrong is said by the service, which must see it.
        ("json_object", False, {"json_object": False}),
        ("regex", "", {"regex": ""}),
        ("choice", [], {"choice": {}}),
    ],
)
def test_a_form_is_structured_output(option: str, value: Any, sent: dict[str, Any]) -> None:
    options: Any = {option: value}
    assert build_request("hi", options).sampling == types.SamplingParams(structured_output=sent)


def test_an_answer_has_one_form() -> None:
    with pytest.raises(ValueError, match="json_object and regex are given"):
        build_request("hi", {"regex": "a", "json_object": True})


def test_one_stop_string_needs_no_list() -> None:
    assert build_request("hi", {"stop": "END"}).sampling.stop == ["END"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"max_tokens": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"top_k": 2**32}, ValueError),
        ({"stop_token_ids": [-1]}, ValueError),
        ({"banned_token_ids": [2**32]}, ValueError),
        ({"logit_bias": {-1: 1.0}}, ValueError),
        ({"n": -1}, ValueError),
        ({"priority": 2**31}, ValueError),
        ({"logit_bias": {"a": 1.0}}, TypeError),
        ({"logit_bias": {1: "much"}}, TypeError),
        ({"stop": [5]}, TypeError),
        ({"choice": "yes"}, TypeError),
        ({"choice": [1]}, TypeError),
        ({"json_schema": 5}, TypeError),
        ({"json_schema": {"x": object()}}, TypeError),
        ({"n": None}, TypeError),
        ({"max_tokens": "many"}, TypeError),
        ({"temperature": "hot"}, TypeError),
        ({"max_tokens": None}, TypeError),
        ({"model": 5}, TypeError),
    ],
)
def test_values_that_cannot_be_sent_are_refused_here(options: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        build_request("hi", options)


@pytest.mark.parametrize("options", [{"n": 2**32}, {"top_k": -1}, {"temperature": "hot"}])
def test_a_number_that_cannot_be_sent_is_named(options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))}: "):
        build_request("hi", options)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_go_there_and_back(token_ids: list[int]) -> None:
    packed = _requests.pack_token_ids(token_ids)
    assert packed == b"".join(token.to_bytes(4, "little") for token in token_ids)
    assert _requests.unpack_token_ids(packed) == token_ids
