"""A handler whose caller has gone fails at its next read or write: nobody's fault, and no news for the log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.trace import SpanKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    Served = Callable[..., AbstractAsyncContextManager[Any]]
    Context = grpc.aio.ServicerContext[bytes, bytes]

PREFIX = "/kvbaton.test.Shapes/"


async def test_a_write_that_the_callers_end_cut_off_is_no_internal_error(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def cut_off(request: bytes, context: Context) -> None:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    async with served(unary_stream=cut_off) as opened:
        call = opened.unary_stream(PREFIX + "unary_stream")(b"")
        server = await spans.one(SpanKind.SERVER)
        call.cancel()
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert not [record for record in caplog.records if record.name.startswith("kvbaton")]


async def in_a_group(error: Exception) -> None:
    async def fail() -> None:
        raise error

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fail())
        tasks.create_task(asyncio.Event().wait())


async def test_a_write_that_was_cut_off_within_a_task_group_is_no_internal_error(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def cut_off(request: bytes, context: Context) -> None:
        await in_a_group(grpc.aio.InternalError("Failed grpc_call_start_batch"))

    async with served(unary_stream=cut_off) as opened:
        call = opened.unary_stream(PREFIX + "unary_stream")(b"")
        server = await spans.one(SpanKind.SERVER)
        call.cancel()
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert caplog.records == []


async def test_a_cut_off_write_does_not_hide_a_failure_beside_it(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def both(request: bytes, context: Context) -> None:
        raise ExceptionGroup("", [grpc.aio.InternalError("Failed grpc_call_start_batch"), ValueError("a bug")])

    async with served(unary_stream=both) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_stream(PREFIX + "unary_stream")(b"", timeout=10).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "a bug" in caplog.text


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_cancelled_rpc_that_is_still_used_is_not_logged(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture, grouped: bool
) -> None:
    waiting = asyncio.Event()

    async def late(request: bytes, context: Context) -> None:
        await context.write(b"one")
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            error = grpc.aio.UsageError("RPC already finished.")
            raise ExceptionGroup("", [error]) if grouped else error

    async with served(unary_stream=late) as opened:
        call = opened.unary_stream(PREFIX + "unary_stream")(b"")
        assert await call.read() == b"one"
        await waiting.wait()
        call.cancel()
        server = await spans.one(SpanKind.SERVER)
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert caplog.records == []


async def test_a_live_rpc_that_is_used_wrongly_is_an_internal_error(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def wrong(request: bytes, context: Context) -> None:
        raise grpc.aio.UsageError("Initial metadata already sent")

    async with served(unary_stream=wrong) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_stream(PREFIX + "unary_stream")(b"", timeout=10).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "already sent" in caplog.text
