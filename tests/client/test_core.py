"""Requests out, events in: what the SDK sends for what it was told, and what it makes of what comes back. No calls."""

import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.client import _core, _errors
from kvbaton.client._core import Assembly, Chunk, Usage, build_prompt, build_request
from kvbaton.client._errors import KvbatonError, ServiceError, from_status
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import token_event

PRESENT = ("max_tokens", "temperature", "top_k", "top_p", "seed")


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
    options: Any = {"max_token": 3, "stop": ["x"]}
    with pytest.raises(TypeError, match="no option max_token, stop"):
        build_request("hi", options)


@pytest.mark.parametrize(("timeout", "sent"), [(2.0, 2.0), (float("inf"), None), (1e12, None)])
def test_a_timeout_beyond_all_clocks_is_none(timeout: float, sent: float | None) -> None:
    assert _core.deadline({"timeout": timeout}) == sent
    assert _core.deadline({}) is None


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


def test_every_option_of_a_request_has_its_field() -> None:
    options: _core.GenerateOptions = {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.25,
        "seed": 2**64 - 1,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "request_id": "r",
        "timeout": 5.0,
        "metadata": [("a", "b")],
    }
    assert set(options) == set(_core.GenerateOptions.__annotations__)
    assert build_request("hi", options) == pb.GenerateRequest(
        model="m",
        prompt=pb.Prompt(text="hi"),
        sampling=types.SamplingParams(
            max_tokens=3,
            temperature=0.5,
            top_k=4,
            top_p=0.25,
            seed=2**64 - 1,
            stop_token_ids=[7, 8],
            ignore_eos=True,
        ),
        request_id="r",
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"max_tokens": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"top_k": 2**32}, ValueError),
        ({"stop_token_ids": [-1]}, ValueError),
        ({"max_tokens": "many"}, TypeError),
        ({"temperature": "hot"}, TypeError),
        ({"max_tokens": None}, TypeError),
        ({"model": 5}, TypeError),
    ],
)
def test_values_that_cannot_be_sent_are_refused_here(options: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        build_request("hi", options)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_go_there_and_back(token_ids: list[int]) -> None:
    packed = _core.pack_token_ids(token_ids)
    assert packed == b"".join(token.to_bytes(4, "little") for token in token_ids)
    assert _core.unpack_token_ids(packed) == token_ids


def event(*args: Any, **kwargs: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=token_event(*args, **kwargs))


def finished(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.GenerateFinished(**fields))


def test_events_are_assembled_to_an_answer() -> None:
    assembly = Assembly()
    assert assembly.add(event(0, 10, text="He")) == Chunk(0, (10,), "He")
    assert assembly.add(event(1, 11, 12, text="llo")) == Chunk(1, (11, 12), "llo")
    assert assembly.add(event(3, 13)) == Chunk(3, (13,), "")
    last = finished(
        request_id="r",
        model="m",
        finish_reason=types.FINISH_REASON_STOP,
        usage=types.Usage(prompt_tokens=1, completion_tokens=4, cached_tokens=2),
        timings=types.Timings(total_seconds=3),
        seed=9,
        prefill_worker="p:1",
        decode_worker="d:1",
    )
    assert assembly.add(last) is None
    result = assembly.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("Hello", (10, 11, 12, 13), "stop")
    assert result.usage == Usage(1, 4, 2)
    assert result.timings.total_seconds == 3
    assert (result.request_id, result.model, result.seed) == ("r", "m", 9)
    assert (result.prefill_worker, result.decode_worker) == ("p:1", "d:1")


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (types.FINISH_REASON_STOP, "stop"),
        (types.FINISH_REASON_LENGTH, "length"),
        (types.FINISH_REASON_UNSPECIFIED, "unknown"),
    ],
)
def test_finish_reasons_have_names(reason: Any, name: str) -> None:
    assembly = Assembly()
    assembly.add(finished(finish_reason=reason))
    assert assembly.result().finish_reason == name


@pytest.mark.parametrize("index", [0, 2])
def test_a_gap_or_a_repeat_is_an_error(index: int) -> None:
    assembly = Assembly()
    assembly.add(event(0, 10))
    with pytest.raises(ServiceError, match=f"token {index} came where 1 was next"):
        assembly.add(event(index, 11))


def test_an_answer_without_its_end_is_an_error() -> None:
    assembly = Assembly()
    assembly.add(event(0, 10))
    with pytest.raises(ServiceError, match="ended without a result"):
        assembly.result()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, _errors.InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, _errors.OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, _errors.UnavailableError),
        (grpc.StatusCode.ABORTED, _errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, _errors.DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, _errors.RequestCancelledError),
        (grpc.StatusCode.INTERNAL, ServiceError),
        (grpc.StatusCode.UNKNOWN, ServiceError),
        (grpc.StatusCode.UNIMPLEMENTED, ServiceError),
    ],
)
def test_every_status_has_its_error(code: grpc.StatusCode, kind: type[KvbatonError]) -> None:
    error = from_status(code, "field: text")
    assert type(error) is kind
    assert str(error) == "field: text"
    assert str(from_status(code, "")) == str(from_status(code, None)) == code.name


def test_an_invalid_argument_names_its_field() -> None:
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, "prompt.chat.messages[1].role: 'x' is not one of: a, b")
    assert isinstance(error, _errors.InvalidArgumentError)
    assert error.field == "prompt.chat.messages[1].role"


def test_the_sdk_imports_neither_a_model_nor_a_service() -> None:
    program = (
        "import sys, kvbaton.client\n"
        "names = ('torch', 'transformers', 'numpy', 'click', 'opentelemetry', 'kvbaton.engine', 'kvbaton.model',"
        " 'kvbaton.rpc', 'kvbaton.router', 'kvbaton.handoff', 'kvbaton.text', 'kvbaton.cli', 'kvbaton.worker')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
