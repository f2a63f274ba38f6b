"""Spans and errors of all four RPC shapes, and what the contributed interceptors get wrong."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.rpc.serving import channel
from kvbaton.rpc.telemetry import context_with, start_span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    Served = Callable[..., AbstractAsyncContextManager[Any]]
    Context = grpc.aio.ServicerContext[bytes, bytes]

PREFIX = "/kvbaton.test.Shapes/"


@pytest.fixture(autouse=True)
def _no_lost_contexts(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert "Failed to detach" not in caplog.text


def names_current_span() -> bytes:
    """The span id that the handler sees as its own, to be compared with what was exported."""
    return format(trace.get_current_span().get_span_context().span_id, "016x").encode()


async def unary_unary(request: bytes, context: Context) -> bytes:
    return names_current_span()


async def unary_stream(request: bytes, context: Context) -> None:
    await context.write(names_current_span())
    await context.write(request)


async def stream_unary(requests: AsyncIterator[bytes], context: Context) -> bytes:
    return names_current_span() + b"".join([request async for request in requests])


async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> None:
    await context.write(names_current_span())
    async for request in requests:
        await context.write(request)


async def generator(request: bytes, context: Context) -> AsyncIterator[bytes]:
    yield names_current_span()
    yield request


async def feed(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def exchange(opened: Any, name: str) -> list[bytes]:
    """Call a method of any shape with the request b"x" and return the responses."""
    call = getattr(opened, name)(PREFIX + name)
    argument = feed(b"x") if name.startswith("stream") else b"x"
    if name.endswith("unary"):
        return [await call(argument, timeout=10)]
    return [response async for response in call(argument, timeout=10)]


@pytest.mark.parametrize(
    ("name", "behaviour"),
    [
        ("unary_unary", unary_unary),
        ("unary_stream", unary_stream),
        ("unary_stream", generator),
        ("stream_unary", stream_unary),
        ("stream_stream", stream_stream),
    ],
)
async def test_each_shape_has_both_spans_in_one_trace(served: Served, spans: Any, name: str, behaviour: Any) -> None:
    root = start_span("root")
    token = otel_context.attach(context_with(root))
    try:
        async with served(**{name: behaviour}) as opened:
            responses = await exchange(opened, name)
    finally:
        otel_context.detach(token)
    client, server = await spans.one(SpanKind.CLIENT), await spans.one(SpanKind.SERVER)
    assert client.parent.span_id == root.get_span_context().span_id
    assert server.parent.span_id == client.context.span_id
    assert server.context.trace_id == root.get_span_context().trace_id
    assert responses[0][:16].decode() == format(server.context.span_id, "016x")
    for span in (client, server):
        assert span.name == f"kvbaton.test.Shapes/{name}"
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == span.name
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert "error.type" not in span.attributes
        assert span.status.status_code is StatusCode.UNSET
    assert client.attributes["server.address"] == "127.0.0.1"
    assert isinstance(client.attributes["server.port"], int)


async def test_without_a_provider_calls_work_and_no_metadata_is_added(served: Served) -> None:
    async def keys(request: bytes, context: Context) -> bytes:
        return " ".join(key for key, _ in context.invocation_metadata() or ()).encode()

    async with served(unary_unary=keys) as opened:
        sent = await opened.unary_unary(PREFIX + "unary_unary")(b"", metadata=(("mine", "1"),))
    assert b"mine" in sent
    assert b"traceparent" not in sent


async def test_an_untraced_process_passes_its_callers_context_on(served: Served) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def last(request: bytes, context: Context) -> bytes:
        return str(dict(context.invocation_metadata() or ())["traceparent"]).encode()

    async with served(unary_unary=last) as far:

        async def relay(request: bytes, context: Context) -> bytes:
            return bytes(await far.unary_unary(PREFIX + "unary_unary")(request))

        async with served(unary_unary=relay) as near:
            metadata = (("traceparent", parent),)
            assert await near.unary_unary(PREFIX + "unary_unary")(b"", metadata=metadata) == parent.encode()


@pytest.mark.parametrize("name", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_domain_errors_reach_the_caller_by_the_table(served: Served, spans: Any, name: str) -> None:
    async def refuse(request: Any, context: Context) -> bytes:
        if name.startswith("stream"):
            # A status that overtakes the client's writes would be INTERNAL in the client's span.
            await stream_unary(request, context)
        raise InvalidArgumentError("sampling.top_p", "is 2.0; it must be above 0 and at most 1")

    async with served(**{name: refuse}) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await exchange(opened, name)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    back = from_rpc_error(caught.value, "router")
    assert isinstance(back, InvalidArgumentError)
    assert back.field == "sampling.top_p"
    client, server = await spans.one(SpanKind.CLIENT), await spans.one(SpanKind.SERVER)
    for span in (client, server):
        assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
        assert span.attributes["error.type"] == "INVALID_ARGUMENT"
    assert client.status.status_code is StatusCode.ERROR
    assert server.status.status_code is StatusCode.UNSET, "a wrong request is no failure of the server"


async def test_an_error_after_messages_and_inside_a_task_group(served: Served, spans: Any) -> None:
    async def fail() -> None:
        raise OverloadedError("the waiting line is full (64)", retry_after_seconds=2.5)

    async def partial(request: bytes, context: Context) -> None:
        await context.write(b"one")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            tasks.create_task(asyncio.Event().wait())

    async with served(unary_stream=partial) as opened:
        call = opened.unary_stream(PREFIX + "unary_stream")(b"", timeout=10)
        assert await call.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    back = from_rpc_error(caught.value, "decode-0")
    assert isinstance(back, OverloadedError)
    assert back.retry_after_seconds == 2.5


async def test_unexpected_errors_are_internal_logged_and_tell_nothing(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: bytes, context: Context) -> bytes:
        raise ValueError("/etc/secret is unreadable")

    async with served(unary_unary=broken) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await exchange(opened, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    logged = [record for record in caplog.records if record.name == "kvbaton.rpc.errors"]
    assert logged[0].levelno == logging.ERROR
    assert logged[0].exc_info
    assert "secret" in caplog.text
    server = await spans.one(SpanKind.SERVER)
    assert server.status.status_code is StatusCode.ERROR


async def test_a_cancellation_that_nobody_asked_for_is_an_internal_error(served: Served, spans: Any) -> None:
    async def leaky(request: bytes, context: Context) -> bytes:
        inner: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        inner.cancel()
        return await inner

    async with served(unary_unary=leaky) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await exchange(opened, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert (await spans.one(SpanKind.SERVER)).attributes["rpc.response.status_code"] == "INTERNAL"


async def test_a_library_handlers_own_abort_is_kept(served: Served, spans: Any) -> None:
    async def library(request: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

    async with served(unary_unary=library) as opened:
        with pytest.raises(grpc.aio.AioRpcError, match="no such thing") as caught:
            await exchange(opened, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await spans.one(SpanKind.SERVER)).attributes["rpc.response.status_code"] == "NOT_FOUND"


class Endless:
    """Handlers that write once and then wait for ever, and record how they were told to end."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[Any] | None = None
        # A client may have the message before the write has returned, and a write that is cut off fails with
        # grpc.aio.InternalError instead of being cancelled.
        self.waiting = asyncio.Event()

    async def wait(self) -> None:
        self.waiting.set()
        self.task = asyncio.current_task()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            same = asyncio.current_task() is self.task
            self.ended.set_result(f"{type(error).__name__} {same}")
            raise

    async def writing(self, request: Any, context: Context) -> None:
        await context.write(b"one")
        await self.wait()

    async def yielding(self, request: Any, context: Context) -> AsyncIterator[bytes]:
        yield b"one"
        await self.wait()


@pytest.mark.parametrize("style", ["writing", "yielding"])
@pytest.mark.parametrize("name", ["unary_stream", "stream_stream"])
async def test_a_cancelled_stream_reaches_the_handler_and_both_spans_are_exported(
    served: Served, spans: Any, name: str, style: str
) -> None:
    endless = Endless()
    async with served(**{name: getattr(endless, style)}) as opened:
        call = getattr(opened, name)(PREFIX + name)(feed(b"x") if name == "stream_stream" else b"x")
        assert await call.read() == b"one"
        await endless.waiting.wait()
        call.cancel()
        async with asyncio.timeout(10):
            assert await endless.ended == "CancelledError True"
        client, server = await spans.one(SpanKind.CLIENT), await spans.one(SpanKind.SERVER)
    for span in (client, server):
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"
        assert span.attributes["error.type"] == "CANCELLED"


async def test_cancelling_the_task_that_reads_ends_both_spans(served: Served, spans: Any) -> None:
    endless = Endless()
    async with served(unary_stream=endless.writing) as opened:
        first = asyncio.Event()

        async def read() -> None:
            async for _ in opened.unary_stream(PREFIX + "unary_stream")(b""):
                first.set()

        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(read())
            await first.wait()
            reader.cancel()
        client, server = await spans.one(SpanKind.CLIENT), await spans.one(SpanKind.SERVER)
    assert client.attributes["rpc.response.status_code"] == "CANCELLED"
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_a_deadline_ends_both_sides(served: Served, spans: Any) -> None:
    endless = Endless()
    async with served(unary_stream=endless.writing) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in opened.unary_stream(PREFIX + "unary_stream")(b"", timeout=0.2):
                pass
        async with asyncio.timeout(10):
            assert await endless.ended == "CancelledError True"
        client = await spans.one(SpanKind.CLIENT)
        await spans.one(SpanKind.SERVER)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"


async def test_a_handler_that_fails_while_cancelled_is_cancelled(
    served: Served, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = asyncio.Event()

    async def stubborn(request: bytes, context: Context) -> None:
        await context.write(b"one")
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("the cleanup failed")

    async with served(unary_stream=stubborn) as opened:
        call = opened.unary_stream(PREFIX + "unary_stream")(b"")
        assert await call.read() == b"one"
        await waiting.wait()
        call.cancel()
        server = await spans.one(SpanKind.SERVER)
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert "the cleanup failed" in caplog.text


async def test_bidi_write_and_read_work_through_the_traced_channel(served: Served, spans: Any) -> None:
    async def echo(requests: AsyncIterator[bytes], context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request + b"!")

    async with served(stream_stream=echo) as opened:
        call = opened.stream_stream(PREFIX + "stream_stream")()
        for message in (b"a", b"b", b"c"):
            await call.write(message)
            assert await call.read() == message + b"!"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        client, server = await spans.one(SpanKind.CLIENT), await spans.one(SpanKind.SERVER)
    assert client.attributes["rpc.response.status_code"] == "OK"
    assert server.attributes["rpc.response.status_code"] == "OK"


async def test_client_stream_write_api(served: Served, spans: Any) -> None:
    async with served(stream_unary=stream_unary) as opened:
        call = opened.stream_unary(PREFIX + "stream_unary")()
        await call.write(b"a")
        await call.write(b"b")
        await call.done_writing()
        assert (await call).endswith(b"ab")
        assert (await spans.one(SpanKind.CLIENT)).attributes["rpc.response.status_code"] == "OK"


async def test_a_peer_that_is_not_there_is_one_client_span(spans: Any, unused_tcp_port: int) -> None:
    opened: Any
    async with channel(f"127.0.0.1:{unused_tcp_port}") as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_unary(PREFIX + "unary_unary")(b"")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await spans.one(SpanKind.CLIENT)).attributes["error.type"] == "UNAVAILABLE"


async def test_an_unknown_method_is_unimplemented(served: Served, spans: Any) -> None:
    async with served(unary_unary=unary_unary) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_unary(PREFIX + "Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
