"""Tracing and error mapping around every RPC: a server interceptor, and a channel that traces its calls.

The client side wraps the channel and not its calls, because grpc.aio's client interceptors put a task, an
iterator and a queue between a caller and its stream: each message costs more, and `write()` returns before
gRPC has taken the message. Here the caller gets gRPC's own call object, with one done callback added.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Never

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import context as otel_context
from opentelemetry.trace import INVALID_SPAN, SpanKind, Status, StatusCode

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.rpc.errors import leaves, to_rpc_status
from kvbaton.rpc.telemetry import context_with, extract_context, inject_metadata, start_span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    Handler = grpc.RpcMethodHandler[Any, Any]

ATTR_SYSTEM: Final = "rpc.system.name"
ATTR_METHOD: Final = "rpc.method"
ATTR_STATUS: Final = "rpc.response.status_code"
ATTR_ERROR_TYPE: Final = "error.type"

# Library services, called every few seconds by probes; they have no domain errors either.
_UNTRACED: Final = ("/grpc.health.", "/grpc.reflection.")

# On a server the other codes say that the caller was wrong or has gone, which is not the server's failure.
SERVER_FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Gives each RPC a SERVER span that is current in its handler, and ends it by the error table.

    Handlers are coroutines, or asynchronous generators, which are run inside the RPC's own task, so that a
    client's cancel reaches them as `asyncio.CancelledError`. A request that cannot be parsed is the caller's
    mistake and never reaches the handler. Synchronous handlers pass untouched; health and reflection get no
    span.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one RPC."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        behaviour = _behaviour(handler)
        if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
            return handler
        parent = extract_context(handler_call_details.invocation_metadata)

        async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await _serve(_ServedRpc(method, parent, context), behaviour, request)

        return _like(handler, run)


class _ServedRpc:
    """One RPC on its way through a handler, with its span."""

    def __init__(self, method: str, parent: Context, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.context = context
        self._span: Span = INVALID_SPAN
        if not method.startswith(_UNTRACED):
            self._span = start_span(method[1:], rpc_attributes(method), SpanKind.SERVER, parent)
        self.trace_context = context_with(self._span, parent)

    def end(self, code: grpc.StatusCode, message: str = "") -> None:
        end_span(self._span, code, message, failed=code in SERVER_FAULTS)


async def _serve(rpc: _ServedRpc, behaviour: Callable[..., Any], request: Any) -> Any:
    token = otel_context.attach(rpc.trace_context)
    try:
        response = await _run(behaviour, request, rpc.context)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            # Not this RPC was cancelled, but something that its handler awaited. gRPC would send no status
            # at all, and the caller would wait for ever.
            await _fail(rpc, error)
        rpc.end(grpc.StatusCode.CANCELLED)
        raise
    except grpc.aio.AbortError:
        rpc.end(_set_code(rpc.context), rpc.context.details() or "")
        raise
    except (Exception, BaseExceptionGroup) as error:
        if _is_lost_call(error, rpc.context):
            # The cancellation was on its way, and nobody is left to be told.
            rpc.end(grpc.StatusCode.CANCELLED)
            raise asyncio.CancelledError from error
        await _fail(rpc, error)
    else:
        rpc.end(_set_code(rpc.context))
        return response
    finally:
        otel_context.detach(token)


def _is_lost_call(error: BaseException, context: grpc.aio.ServicerContext[Any, Any]) -> bool:
    """Whether a handler failed only because its call has gone: a read or a write was cut off, or came too late.

    A handler's tasks put such an error into a group. Whatever else is in it is a failure in its own right.
    """
    lost: tuple[type[BaseException], ...] = (grpc.aio.InternalError,)
    task = asyncio.current_task()
    if context.done() or (task is not None and task.cancelling()):
        # On a live call this one is a mistake of the handler's.
        lost += (grpc.aio.UsageError,)
    failures = [leaf for leaf in leaves(error) if not isinstance(leaf, asyncio.CancelledError)]
    return bool(failures) and all(isinstance(failure, lost) for failure in failures)


async def _run(behaviour: Callable[..., Any], request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    if isinstance(request, _Malformed):
        raise request.error
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async with aclosing(behaviour(request, context)) as responses:
        async for response in responses:
            await context.write(response)
    return None


async def _fail(rpc: _ServedRpc, error: BaseException) -> Never:
    """End the RPC with the table's status."""
    status = to_rpc_status(error)
    try:
        await rpc.context.abort(status.code, status.message, status.trailing_metadata)
    except grpc.aio.InternalError:
        # The caller has gone: the handler failed while it was being cancelled, and nobody is left to be told.
        rpc.end(grpc.StatusCode.CANCELLED)
        raise asyncio.CancelledError from error
    except BaseException:
        rpc.end(status.code, status.message)
        raise


def _set_code(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """Return the code that a handler has set by itself; before any is set gRPC answers with the integer 0."""
    code: object = context.code()
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK


def _behaviour(handler: Handler) -> Callable[..., Any] | None:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _like(handler: Handler, behaviour: Callable[..., Any]) -> Handler:
    """Make a handler of the same shape and serialisers around another function."""
    if handler.request_streaming and handler.response_streaming:
        make: Callable[..., Handler] = grpc.stream_stream_rpc_method_handler
    elif handler.request_streaming:
        make = grpc.stream_unary_rpc_method_handler
    elif handler.response_streaming:
        make = grpc.unary_stream_rpc_method_handler
    else:
        make = grpc.unary_unary_rpc_method_handler
    deserialize = _forgiving(handler.request_deserializer, handler.request_streaming)
    return make(behaviour, deserialize, handler.response_serializer)


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request that could not be parsed, on its way to where an error can be told."""

    error: InvalidArgumentError


def _forgiving(deserialize: Callable[[bytes], Any] | None, streaming: bool) -> Callable[[bytes], Any] | None:
    """Make malformed bytes the caller's mistake, which gRPC takes for the server's, with a traceback.

    A stream is parsed while the handler reads, and may raise there. A single request is parsed by gRPC before the
    handler is called.
    """
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as problem:
            message = getattr(deserialize, "__self__", None)
            name = message.DESCRIPTOR.full_name if message is not None else "a message"
            error = InvalidArgumentError("request", f"cannot be parsed as {name}")
            if streaming:
                raise error from problem
            return _Malformed(error)

    return parse


class TracedChannel(grpc.aio.Channel):
    """A channel whose calls carry the current trace context and have a CLIENT span each.

    The span covers the call's whole life and ends in its done callback, whatever ended it.
    """

    def __init__(self, inner: grpc.aio.Channel, attributes: dict[str, AttributeValue]) -> None:
        """`inner` does the work and is closed with this one; `attributes` go on every span."""
        self._inner = inner
        self._attributes = attributes

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a traced callable; arguments as for `grpc.aio.Channel`."""
        return self._traced(method, self._inner.unary_unary(method, *args, **kwargs))

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a traced callable; arguments as for `grpc.aio.Channel`."""
        return self._traced(method, self._inner.unary_stream(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a traced callable; arguments as for `grpc.aio.Channel`."""
        return self._traced(method, self._inner.stream_unary(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a traced callable; arguments as for `grpc.aio.Channel`."""
        return self._traced(method, self._inner.stream_stream(method, *args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; calls that outlive `grace` seconds are cancelled."""
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the connectivity."""
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the connectivity is another one."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the channel is connected."""
        await self._inner.channel_ready()

    async def __aenter__(self) -> TracedChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _traced(self, method: str, multicallable: Callable[..., Any]) -> Callable[..., Any]:
        attributes = {**rpc_attributes(method), **self._attributes}
        untraced = method.startswith(_UNTRACED)

        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            if untraced:
                return multicallable(*args, metadata=metadata, **kwargs)
            span = start_span(method[1:], attributes, SpanKind.CLIENT)
            injected = inject_metadata(metadata, context_with(span))
            try:
                rpc = multicallable(*args, metadata=injected, **kwargs)
            except BaseException as error:
                span.set_attribute(ATTR_ERROR_TYPE, type(error).__qualname__)
                span.set_status(Status(StatusCode.ERROR, str(error)))
                span.end()
                raise
            if span.is_recording():
                _end_with_call(rpc, span)
            return rpc

        return call


def _end_with_call(rpc: Any, span: Span) -> None:
    """End the span when the call ends, with the status that gRPC has then.

    A call that the peer ends during a write has INTERNAL at that moment; the peer's own status replaces it a
    little later, without another callback. The peer's span has the right one.
    """

    def done(ended: Any) -> None:
        code = _result(ended.code())
        end_span(span, code, _result(ended.details()) or "", failed=code is not grpc.StatusCode.OK)

    rpc.add_done_callback(done)


def _result(finished: Coroutine[Any, Any, Any]) -> Any:
    """Take the result of a coroutine that has nothing left to wait for."""
    try:
        finished.send(None)
    except StopIteration as stop:
        return stop.value
    finished.close()
    raise RuntimeError("the call has ended and its status is unknown")


def end_span(span: Span, code: grpc.StatusCode, message: str, *, failed: bool) -> None:
    """End an RPC's span with the status that the RPC has ended with; `failed` says whether the span is an error."""
    if span.is_recording():
        span.set_attribute(ATTR_STATUS, code.name)
        if code is not grpc.StatusCode.OK:
            span.set_attribute(ATTR_ERROR_TYPE, code.name)
        if failed:
            span.set_status(Status(StatusCode.ERROR, message))
    span.end()


def rpc_attributes(method: str) -> dict[str, AttributeValue]:
    """What each span of an RPC of /package.Service/Method carries."""
    return {ATTR_SYSTEM: "grpc", ATTR_METHOD: method[1:]}
