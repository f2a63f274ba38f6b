"""The table, both ways."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2  # type: ignore[import-untyped]

from kvbaton.engine.errors import (
    InvalidArgumentError,
    KvbatonError,
    NotANumberError,
    NotFoundError,
    OverloadedError,
    StartupError,
    TransferRejectedError,
    UnavailableError,
)
from kvbaton.rpc.errors import DETAILS_KEY, from_rpc_error, root_cause, to_rpc_status

PEER = "10.0.0.7:7002"


def over_the_wire(error: BaseException) -> KvbatonError | TimeoutError:
    status = to_rpc_status(error)
    trailing = grpc.aio.Metadata(*status.trailing_metadata)
    return from_rpc_error(grpc.aio.AioRpcError(status.code, None, trailing, status.message), PEER)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("sampling.top_k", "is 0; it must be 1 or more"), "INVALID_ARGUMENT"),
        (NotFoundError("no model 'gpt'; this server has 'tiny'"), "NOT_FOUND"),
        (OverloadedError("64 requests are waiting", 0.25), "RESOURCE_EXHAUSTED"),
        (TransferRejectedError("frame 3: the checksum differs"), "ABORTED"),
        (NotANumberError("token 7: the logits are not numbers"), "INTERNAL"),
    ],
)
def test_round_trip_keeps_type_and_message(error: KvbatonError, code: str) -> None:
    assert to_rpc_status(error).code.name == code
    back = over_the_wire(error)
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_field_and_retry_delay_survive() -> None:
    invalid = over_the_wire(InvalidArgumentError("prompt", "is empty: give at least one token"))
    assert isinstance(invalid, InvalidArgumentError)
    assert invalid.field == "prompt"
    overloaded = over_the_wire(OverloadedError("full", retry_after_seconds=12.75))
    assert isinstance(overloaded, OverloadedError)
    assert overloaded.retry_after_seconds == 12.75


@pytest.mark.parametrize("delay", [-1.0, float("nan"), float("inf")])
def test_a_nonsensical_delay_is_no_delay(delay: float) -> None:
    back = over_the_wire(OverloadedError("full", retry_after_seconds=delay))
    assert isinstance(back, OverloadedError)
    assert back.retry_after_seconds == 0


def test_unavailable_names_the_peer_on_the_way_back() -> None:
    back = over_the_wire(UnavailableError("draining"))
    assert isinstance(back, UnavailableError)
    assert PEER in str(back)
    assert "draining" in str(back)


@pytest.mark.parametrize("error", [TimeoutError(), TimeoutError("no block became free")])
def test_timeouts_are_deadlines(error: TimeoutError) -> None:
    status = to_rpc_status(error)
    assert status.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status.message
    assert isinstance(over_the_wire(error), TimeoutError)


def test_a_models_failure_is_no_failure_of_the_service(caplog: pytest.LogCaptureFixture) -> None:
    to_rpc_status(NotANumberError("token 7: the logits are not numbers"))
    assert not caplog.records
    other = grpc.aio.Metadata((DETAILS_KEY, status_pb2.Status(code=13).SerializeToString()))
    back = from_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, None, other, "what"), PEER)
    assert isinstance(back, UnavailableError)


@pytest.mark.parametrize("error", [ValueError("/root/key"), StartupError("/root/key"), KeyError("/root/key")])
def test_everything_else_is_internal_and_logged(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    status = to_rpc_status(error)
    assert status.code is grpc.StatusCode.INTERNAL
    assert "/root/key" not in status.message
    assert caplog.records[0].levelno == logging.ERROR
    assert "/root/key" in caplog.text


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in grpc.StatusCode
        if code.name
        not in ["OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED"]
    ],
)
def test_other_codes_mean_that_the_peer_is_lost(code: grpc.StatusCode) -> None:
    back = from_rpc_error(grpc.aio.AioRpcError(code, None, None, "socket closed"), PEER)
    assert isinstance(back, UnavailableError)
    assert PEER in str(back)
    assert "socket closed" in str(back)


@pytest.mark.parametrize("trailing", [None, grpc.aio.Metadata((DETAILS_KEY, b"\xff\xff\xff"))])
def test_details_may_be_missing_or_garbage(trailing: Any) -> None:
    def back(code: grpc.StatusCode) -> KvbatonError | TimeoutError:
        return from_rpc_error(grpc.aio.AioRpcError(code, None, trailing, "what"), PEER)

    assert str(back(grpc.StatusCode.INVALID_ARGUMENT)) == "request: what"
    overloaded = back(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert isinstance(overloaded, OverloadedError)
    assert overloaded.retry_after_seconds == 1.0


def test_long_messages_are_cut_between_characters_so_that_they_fit_into_the_trailers() -> None:
    status = to_rpc_status(InvalidArgumentError("prompt", "→" * 5000))
    assert len(status.message.encode()) <= 1000
    assert status.message.endswith("…")
    assert sum(len(value) for _, value in status.trailing_metadata) < 2500


def test_groups_show_their_cause() -> None:
    domain, plain = OverloadedError("full"), ValueError("x")
    nested = BaseExceptionGroup("", [plain, BaseExceptionGroup("", [asyncio.CancelledError(), domain])])
    assert root_cause(nested) is domain
    assert root_cause(BaseExceptionGroup("", [asyncio.CancelledError(), plain])) is plain
    only = asyncio.CancelledError()
    assert root_cause(BaseExceptionGroup("", [only])) is only
    assert root_cause(plain) is plain
    assert to_rpc_status(nested).code is grpc.StatusCode.RESOURCE_EXHAUSTED
