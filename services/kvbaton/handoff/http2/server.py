"""A gRPC server for a few methods whose calls are streams of large messages."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from kvbaton.engine.errors import StartupError
from kvbaton.handoff.http2.carrier import Carrier, peer_name
from kvbaton.handoff.http2.endpoint import Endpoint, Limits
from kvbaton.handoff.http2.frames import Code
from kvbaton.handoff.http2.headers import Headers
from kvbaton.handoff.http2.incoming import IncomingCall, ServedCall, ServerStream
from kvbaton.handoff.http2.streams import Stream, StreamEvents
from kvbaton.rpc.serving import MAX_MESSAGE_BYTES, format_address

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
_ACCEPTS_PER_CALLBACK = 16
_BACKLOG = 256
_PAUSE_SECONDS = 0.1

Methods = Mapping[str, Callable[[ServerStream], IncomingCall]]
"""By /package.Service/Method: what makes the receiver of one call."""


class Server:
    """A server that is listening. `serving_kv` makes it."""

    def __init__(self, methods: Methods, host: str) -> None:
        self.host = host
        self.port = 0
        self._methods = methods
        self._loop = asyncio.get_running_loop()
        self._listening: list[socket.socket] = []
        self._connections: set[Carrier] = set()

    @property
    def address(self) -> str:
        """host:port with the port that was really bound."""
        return format_address(self.host, self.port)

    def listen(self, sockets: list[socket.socket]) -> None:
        """Accept connections from bound sockets of one port."""
        self.port = sockets[0].getsockname()[1]
        for bound in sockets:
            bound.listen(_BACKLOG)
            bound.setblocking(False)
            self._listening.append(bound)
            self._loop.add_reader(bound.fileno(), self._accept, bound)

    def close(self) -> None:
        """Stop listening and end all connections, and with them their calls."""
        for bound in self._listening:
            self._loop.remove_reader(bound.fileno())
            bound.close()
        self._listening.clear()
        for carrier in list(self._connections):
            carrier.close(Code.NO_ERROR, "the server is shutting down")

    def _accept(self, bound: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_CALLBACK):
            try:
                connected, _ = bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors: the connection stays in the backlog, and would wake us without end.
                logger.warning("cannot accept a connection: %s", error)
                self._loop.remove_reader(bound.fileno())
                self._loop.call_later(_PAUSE_SECONDS, self._resume, bound)
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                logger.warning("a connection from %s is refused: there are %d", peer_name(connected), MAX_CONNECTIONS)
                connected.close()
                continue
            self._serve(connected)

    def _resume(self, bound: socket.socket) -> None:
        if bound in self._listening:
            self._loop.add_reader(bound.fileno(), self._accept, bound)

    def _serve(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        peer = peer_name(connected)
        flush: list[Callable[[], None]] = []

        def accept(stream: Stream, headers: Headers) -> StreamEvents:
            return ServedCall(self._methods, endpoint, stream, peer, flush[0])

        endpoint = Endpoint(Limits(MAX_MESSAGE_BYTES), accept)
        carrier = Carrier(connected, endpoint, lambda: self._connections.discard(carrier))
        flush.append(carrier.flush)
        if not carrier.closed:
            self._connections.add(carrier)


@asynccontextmanager
async def serving_kv(methods: Methods, host: str, port: int) -> AsyncIterator[Server]:
    """Serve `methods` until the block ends; then all connections end at once. Port 0 takes a free one.

    Raises StartupError if the address cannot be listened on.
    """
    server = Server(methods, host)
    server.listen(await _bind(host, port))
    logger.debug("listening on %s", server.address)
    try:
        yield server
    finally:
        server.close()


async def _bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each of the host's addresses, all on one port."""
    address = format_address(host, port)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise StartupError(f"cannot listen on {address}: unknown host {host!r}") from error
    bound: list[socket.socket] = []
    for family, kind, protocol, _, resolved in found:
        if bound:
            resolved = (resolved[0], bound[0].getsockname()[1], *resolved[2:])
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(len(found) > 1))
            listening.bind(resolved)
        except OSError as error:
            listening.close()
            if not bound:
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                raise StartupError(f"cannot listen on {address}: {reason}") from error
            logger.warning("cannot listen on %s as well: %s", resolved[0], error)
        else:
            bound.append(listening)
    return bound
