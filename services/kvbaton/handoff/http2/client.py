"""A gRPC client on one TCP connection, for streams of large messages."""

import asyncio
import socket
from contextlib import suppress

import grpc
from opentelemetry.trace import SpanKind

from kvbaton.engine.errors import UnavailableError
from kvbaton.handoff.http2.calls import ClientCall, ClientStream
from kvbaton.handoff.http2.carrier import Carrier
from kvbaton.handoff.http2.endpoint import Endpoint, Limits
from kvbaton.handoff.http2.frames import Code
from kvbaton.handoff.http2.headers import request_headers
from kvbaton.rpc.interceptors import rpc_attributes
from kvbaton.rpc.serving import MAX_MESSAGE_BYTES, format_address, parse_address
from kvbaton.rpc.telemetry import context_with, inject_metadata, start_span

STREAM_WINDOW = 1 << 20
"""Most bytes of answers that a stream holds for a reader that is slow."""


class Connection:
    """One TCP connection with any number of calls on it. For one event loop."""

    def __init__(self, connected: socket.socket, host: str, port: int) -> None:
        """Takes over a connected, non-blocking socket. `open` is how to get one."""
        self.endpoint = format_address(host, port)
        self._attributes: dict[str, str | int] = {"server.address": host, "server.port": port}
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._http2 = Endpoint(Limits(MAX_MESSAGE_BYTES, STREAM_WINDOW), None, self._on_settled)
        self._carrier = Carrier(connected, self._http2, self._on_lost)

    @classmethod
    async def open(cls, endpoint: str, timeout: float) -> "Connection":
        """Connect to host:port and wait until the peer has shown that it speaks HTTP/2.

        Raises UnavailableError when that does not happen within `timeout` seconds.
        """
        host, port = parse_address(endpoint)
        try:
            async with asyncio.timeout(timeout):
                connection = cls(await _connect(host, port), host, port)
                try:
                    await connection._settled
                except BaseException:
                    # Also where it has settled, and whoever waited was cancelled in the same turn of the loop.
                    await connection.close()
                    raise
        except TimeoutError as error:
            raise UnavailableError(f"{endpoint} gave no answer for {timeout:g} s") from error
        except OSError as error:
            raise UnavailableError(f"{endpoint} cannot be reached: {error.strerror or error}") from error
        return connection

    @property
    def closed(self) -> bool:
        """Whether no call can be made on it any more, though some may still be running."""
        return self._carrier.closed or self._http2.going_away

    @property
    def num_streams(self) -> int:
        """Calls that have not ended."""
        return len(self._http2.streams)

    def call(self, method: str, timeout: float | None) -> ClientStream:
        """Begin a call of /package.Service/Method that ends within `timeout` seconds, under a CLIENT span.

        Raises UnavailableError when the connection takes no more calls.
        """
        if self.closed:
            raise UnavailableError(f"{self.endpoint}: the connection has ended")
        if self.num_streams >= self._http2.max_streams:
            raise UnavailableError(f"{self.endpoint} takes no more than {self._http2.max_streams} calls at once")
        span = start_span(method[1:], {**rpc_attributes(method), **self._attributes}, SpanKind.CLIENT)
        metadata = inject_metadata(None, context_with(span))
        stream = self._http2.open(request_headers(self.endpoint, method, timeout, metadata))
        call = ClientCall(self.endpoint, self._http2, stream, span)
        self._http2.listen(stream, call)
        # The headers leave with the first message, or on the loop's next turn.
        loop = asyncio.get_running_loop()
        loop.call_soon(self._carrier.flush)
        if timeout is not None:
            call.deadline = loop.call_later(timeout, self._expire, call)
        return ClientStream(call, self._carrier)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and with it the calls that are left: they fail with UnavailableError."""
        self._carrier.close(Code.NO_ERROR, "the connection was closed")

    def _expire(self, call: ClientCall) -> None:
        call.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded")
        self._carrier.flush()

    def _on_settled(self) -> None:
        if not self._settled.done():
            self._settled.set_result(None)

    def _on_lost(self) -> None:
        if not self._settled.done():
            self._settled.set_exception(OSError("the connection was closed before it could be used"))
            # Nobody may be waiting any more.
            self._settled.exception()


async def _connect(host: str, port: int) -> socket.socket:
    """A connected, non-blocking socket: the first of the host's addresses that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    try:
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"unknown host {host!r}") from error
    problem: OSError = OSError(f"unknown host {host!r}")
    for family, kind, protocol, _, address in addresses:
        connecting = socket.socket(family, kind, protocol)
        connecting.setblocking(False)
        try:
            await loop.sock_connect(connecting, address)
        except OSError as error:
            problem = error
            connecting.close()
        except BaseException:
            with suppress(OSError):
                connecting.close()
            raise
        else:
            return connecting
    raise problem
