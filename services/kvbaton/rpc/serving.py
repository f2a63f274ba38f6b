"""Channels, servers, addresses, the event loop and termination: what every process needs around its RPCs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
from grpc_reflection.v1alpha import reflection

from kvbaton.engine.errors import InvalidArgumentError, StartupError
from kvbaton.rpc.health import HealthService
from kvbaton.rpc.interceptors import ServerInterceptor, TracedChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024

# A server refuses clients that ping oftener than every 10 s, so clients ping every 20 s. A peer that does
# not answer a ping within 10 s is gone, and so are its streams, and what they hold. The HTTP/2 transport has
# a ping timeout of its own, a minute unless it is told, and the later of the two decides.
_KEEPALIVE_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
_CHANNEL_OPTIONS: Final = (
    *_KEEPALIVE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # How long one attempt to connect may take, handshakes included: a peer may be far away, or busy.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A connection for each channel, so that bulk KV and token streams never share one.
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVER_OPTIONS: Final = (
    *_KEEPALIVE_OPTIONS,
    # Otherwise two servers share a port in silence, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True)
class Registration:
    """A service: its full name (kvbaton.v1.DecodeService), and what adds its servicer to a server."""

    name: str
    add: Callable[[grpc.aio.Server], None]


class Server:
    """A server that is listening. `serving` makes it."""

    def __init__(self, host: str, port: int, health: HealthService, names: Sequence[str]) -> None:
        self.host = host
        self.port = port
        self._health = health
        self._names = ("", *names)

    @property
    def address(self) -> str:
        """host:port, as a channel's target, with the port that was really bound."""
        return format_address(self.host, self.port)

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks, for the server and for each of its services, whether new calls are welcome."""
        for name in self._names:
            await self._health.set_serving(name, serving)


def channel(target: str) -> grpc.aio.Channel:
    """Open a channel to host:port with the project's options; its calls carry the trace context.

    Connecting happens in the background and never raises here. The channel belongs to the running event loop.
    """
    attributes: dict[str, Any] = {"server.address": target}
    try:
        attributes["server.address"], attributes["server.port"] = parse_address(target)
    except InvalidArgumentError:
        # A target with a scheme, such as dns:///name or unix:path.
        _log.debug("the target %s is not host:port", target)
    return TracedChannel(grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS), attributes)


@asynccontextmanager
async def serving(
    services: Sequence[Registration], host: str, port: int, *, grace_seconds: float = 10.0
) -> AsyncIterator[Server]:
    """Serve until the block ends, with health and reflection beside the services. Port 0 takes a free one.

    The services are SERVING from the start. When the block ends normally, health says NOT_SERVING, new calls
    are refused, and calls in flight may finish within `grace_seconds`; then they are cancelled. When it ends
    with an exception there is no grace.

    Raises StartupError if the address cannot be listened on.
    """
    names = [service.name for service in services]
    health = HealthService()
    server = grpc.aio.server(interceptors=[ServerInterceptor()], options=_SERVER_OPTIONS)
    for service in services:
        service.add(server)
    health.add_to(server)
    reflection.enable_server_reflection((*names, health.name, reflection.SERVICE_NAME), server)
    bound = Server(host, await _bind(server, host, port), health, names)
    await bound.set_serving(True)
    await server.start()
    _log.debug("listening on %s", bound.address)
    grace = 0.0
    try:
        yield bound
        grace = grace_seconds
    finally:
        await health.close()
        await server.stop(grace)


async def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = format_address(host, port)
    await probe(host, port)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address}: {error}") from error
    if bound == 0:
        raise StartupError(f"cannot listen on {address}")
    return bound


async def probe(host: str, port: int) -> None:
    """Bind the address for a moment: gRPC does not say why it cannot, and a model takes minutes to load before.

    Raises StartupError if the address cannot be listened on.
    """
    address = format_address(host, port)
    if not 0 <= port <= 65535:
        raise StartupError(f"cannot listen on {address}: the port must be 0 to 65535")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise StartupError(f"cannot listen on {address}: unknown host {host!r}") from error
    family, kind, protocol, _, resolved = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: a connection in TIME_WAIT must not keep a restarted service from its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(resolved)
            probe.listen(1)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise StartupError(f"cannot listen on {address}: {reason}") from error


def parse_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[ipv6]:port" into host, without brackets, and port.

    Raises InvalidArgumentError (field "address") for anything else.
    """
    host, colon, digits = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    spaced = any(character.isspace() for character in host)
    if spaced or not (host and colon and digits.isascii() and digits.isdigit() and int(digits) <= 65535):
        problem = f"{address!r} is not host:port with a port of 0 to 65535 (an IPv6 host goes in brackets)"
        raise InvalidArgumentError("address", problem)
    return host, int(digits)


def check_peer(option: str, address: str) -> None:
    """Raise StartupError, naming the option, for what no peer can be reached at."""
    try:
        _, port = parse_address(address)
    except InvalidArgumentError as error:
        raise StartupError(f"--{option}: {error}") from error
    if port == 0:
        raise StartupError(f"--{option}: {address!r} has port 0, at which nobody can be reached")


def format_address(host: str, port: int) -> str:
    """Join host and port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a process's main coroutine, on uvloop where it is installed, and return its result."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop: uvloop's where it is installed, asyncio's elsewhere."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def termination_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set, from now on, in the running loop of the main thread.

    The second signal of a kind has its ordinary effect, so that a drain can be cut short. SIGTERM after
    SIGINT is no second one: a launcher in the same terminal sends it when Ctrl-C has already reached
    everybody.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        _log.info("received %s, shutting down", number.name)
        loop.remove_signal_handler(number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event


async def wait_for_termination() -> None:
    """Wait for SIGTERM or SIGINT, as `termination_event` describes."""
    await termination_event().wait()
