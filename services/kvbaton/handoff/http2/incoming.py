"""A server's calls: from a stream's headers to its trailers."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from kvbaton.handoff.http2.endpoint import Endpoint
from kvbaton.handoff.http2.frames import Code
from kvbaton.handoff.http2.headers import RESPONSE_HEADERS, HeaderError, Headers, parse_request, trailers
from kvbaton.handoff.http2.messages import MessageFault, Placement
from kvbaton.handoff.http2.streams import Stream
from kvbaton.rpc.errors import RpcStatus, to_rpc_status
from kvbaton.rpc.interceptors import SERVER_FAULTS, end_span, rpc_attributes
from kvbaton.rpc.telemetry import context_with, extract_context, start_span

logger = logging.getLogger(__name__)


class IncomingCall(Protocol):
    """Receives one call's messages. All of this happens on the server's loop, and must not block for long.

    What any of these methods, or a placement's guard, raises ends the call with its status by `rpc.errors`, unless it
    has been ended already.
    """

    def place(self, start: memoryview, size: int) -> Placement | None:
        """Where to receive the rest of a message of `size` bytes, of which `start` holds the first 256.

        None: it comes whole, by `on_message`, as shorter ones do unasked.
        """
        ...

    def on_placed(self) -> None:
        """The message that was placed has arrived whole."""
        ...

    def on_message(self, message: bytes) -> None:
        """A whole message."""
        ...

    def on_half_close(self) -> None:
        """The client sends no more. The call goes on until `ServerStream.end`."""
        ...

    def on_end(self) -> None:
        """The call has ended, however it came; always, exactly once, and last."""
        ...


class ServerStream:
    """The answering half of a call."""

    def __init__(self, call: "ServedCall", method: str, metadata: Headers, peer: str, trace_context: Context) -> None:
        self.method = method
        """/package.Service/Method"""
        self.metadata = metadata
        self.peer = peer
        """host:port of the client."""
        self.trace_context = trace_context
        """With the call's span, for spans under it."""
        self._call = call

    @property
    def ended(self) -> bool:
        """Whether the call has ended."""
        return self._call.ended

    @property
    def time_remaining(self) -> float | None:
        """Seconds to the caller's deadline; None without one."""
        return self._call.time_remaining

    def send(self, message: bytes) -> None:
        """Answer. Goes out at once, or when the client lets it; does nothing once the call has ended."""
        self._call.send(message)

    def end(self, error: BaseException | None = None) -> None:
        """End the call after what was sent: with OK, or with the status that `rpc.errors` has for `error`."""
        self._call.end(None if error is None else to_rpc_status(error))


class ServedCall:
    """One call. Implements `StreamEvents`: stands between what comes and an `IncomingCall`, which may fail."""

    def __init__(
        self,
        methods: Mapping[str, Callable[[ServerStream], IncomingCall]],
        endpoint: Endpoint,
        stream: Stream,
        peer: str,
        flush: Callable[[], None],
    ) -> None:
        """`flush` sends what the endpoint has to send."""
        self.ended = False
        self._methods = methods
        self._endpoint = endpoint
        self._stream = stream
        self._peer = peer
        self._flush = flush
        self._call: IncomingCall | None = None
        self._span: Span = INVALID_SPAN
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def time_remaining(self) -> float | None:
        """See `ServerStream`."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline.when() - asyncio.get_running_loop().time())

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        """See `StreamEvents`. The second ones are a client's trailers, of which gRPC has none."""
        if self._call is not None or self.ended:
            return
        try:
            request = parse_request(headers)
        except HeaderError as error:
            self.ended = True
            ending = [(":status", "415"), *trailers(grpc.StatusCode.INTERNAL, str(error), ())]
            self._endpoint.end(self._stream, ending)
            return
        make = self._methods.get(request.method)
        if make is None:
            message = f"{request.method[:200]} is not served here"
            self.end(RpcStatus(grpc.StatusCode.UNIMPLEMENTED, message))
            return
        if request.timeout is not None:
            self._deadline = asyncio.get_running_loop().call_later(request.timeout, self._expire)
        parent = extract_context(request.metadata)
        self._span = start_span(request.method[1:], rpc_attributes(request.method), SpanKind.SERVER, parent)
        context = context_with(self._span, parent)
        try:
            self._call = make(ServerStream(self, request.method, request.metadata, self._peer, context))
        except Exception as error:
            self.end(to_rpc_status(error))

    def place(self, start: memoryview, size: int) -> Placement | None:
        """See `MessageListener`."""
        return self._call.place(start, size) if self._call is not None else None

    def on_message(self, message: bytes) -> None:
        """See `MessageListener`."""
        if self._call is not None:
            self._call.on_message(message)

    def on_placed(self) -> None:
        """See `MessageListener`."""
        if self._call is not None:
            self._call.on_placed()

    def on_bytes(self, count: int) -> None:
        """See `StreamEvents`. What came has been taken already."""
        self._endpoint.release(self._stream, count)

    def on_half_close(self) -> None:
        """See `StreamEvents`."""
        if self._call is not None and not self.ended:
            self._call.on_half_close()

    def on_window(self) -> None:
        """See `StreamEvents`. The endpoint has sent what waited."""

    def on_failure(self, error: Exception) -> None:
        """See `StreamEvents`."""
        if self.ended:
            return
        self.end(RpcStatus(error.code, str(error)) if isinstance(error, MessageFault) else to_rpc_status(error))

    def on_reset(self, code: Code, reason: str) -> None:
        """See `StreamEvents`."""
        self._close(grpc.StatusCode.CANCELLED, reason)

    def send(self, message: bytes) -> None:
        """See `ServerStream`."""
        if self.ended:
            return
        if not self._stream.headers_sent:
            self._endpoint.send_headers(self._stream, RESPONSE_HEADERS)
        if self._endpoint.send_soon(self._stream, b"\0" + len(message).to_bytes(4) + message):
            self._flush()
        else:
            self._endpoint.reset(self._stream, Code.ENHANCE_YOUR_CALM)
            self._close(grpc.StatusCode.CANCELLED, "answers are not read")

    def end(self, status: RpcStatus | None) -> None:
        """See `ServerStream`."""
        if self.ended:
            return
        code, message = (grpc.StatusCode.OK, "") if status is None else (status.code, status.message)
        ending = trailers(code, message, status.trailing_metadata if status is not None else ())
        if not self._stream.headers_sent:
            ending = [*RESPONSE_HEADERS, *ending]
        self._endpoint.end(self._stream, ending)
        self._close(code, message)
        self._flush()

    def _expire(self) -> None:
        self.on_failure(TimeoutError("deadline exceeded"))

    def _close(self, code: grpc.StatusCode, message: str) -> None:
        if self.ended:
            return
        self.ended = True
        if self._deadline is not None:
            self._deadline.cancel()
        end_span(self._span, code, message, failed=code in SERVER_FAULTS)
        call, self._call = self._call, None
        if call is not None:
            try:
                call.on_end()
            except Exception:
                logger.exception("the end of a call failed")
