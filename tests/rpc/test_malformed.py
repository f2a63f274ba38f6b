"""Bytes that are no message of the method's kind are the caller's mistake, in every shape of RPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from opentelemetry.trace import SpanKind

from kvbaton.rpc.serving import Registration, channel, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    Served = Callable[..., AbstractAsyncContextManager[Any]]
    Context = grpc.aio.ServicerContext[bytes, bytes]

PREFIX = "/kvbaton.test.Shapes/"


MALFORMED = b"\x0a\xff"
"""A field whose length runs past the end."""


async def feed(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def single(request: Any, context: Context) -> bytes:
    pytest.fail("the handler was called")


async def generator(request: Any, context: Context) -> AsyncIterator[bytes]:
    pytest.fail("the handler was called")
    yield b""


async def iterates(requests: AsyncIterator[Any], context: Context) -> bytes:
    async for _ in requests:
        pass
    return b""


async def reads(requests: AsyncIterator[Any], context: Any) -> bytes:
    while await context.read() is not grpc.aio.EOF:
        pass
    return b""


@pytest.mark.parametrize(
    ("name", "behaviour"),
    [
        ("unary_unary", single),
        ("unary_stream", single),
        ("unary_stream", generator),
        ("stream_unary", iterates),
        ("stream_unary", reads),
        ("stream_stream", iterates),
    ],
)
async def test_a_request_that_cannot_be_parsed_is_invalid_and_not_logged(
    name: str, behaviour: Any, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make = getattr(grpc, f"{name}_rpc_method_handler")
    handlers = {name: make(behaviour, HealthCheckRequest.FromString)}
    generic = grpc.method_handlers_generic_handler(PREFIX.strip("/"), handlers)
    service = Registration(PREFIX.strip("/"), lambda server: server.add_generic_rpc_handlers((generic,)))
    async with serving([service], "127.0.0.1", 0, grace_seconds=0) as server, channel(server.address) as opened:
        argument = feed(MALFORMED) if name.startswith("stream") else MALFORMED
        call = getattr(opened, name)(PREFIX + name)(argument, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if name.endswith("unary") else call.read())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "request: cannot be parsed as grpc.health.v1.HealthCheckRequest"
    assert (await spans.one(SpanKind.SERVER)).attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert caplog.records == []


async def test_a_malformed_health_check_is_invalid_too_and_has_no_span(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(unary_unary=single) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_unary("/grpc.health.v1.Health/Check")(MALFORMED, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert spans.ended == []
    assert caplog.records == []
