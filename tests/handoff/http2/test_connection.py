"""Client and server over real sockets, beside grpcio on either side: calls, deadlines, losses, stalls, fairness."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import grpc
import pytest

from kvbaton.engine.errors import NotFoundError, StartupError, UnavailableError
from kvbaton.handoff.http2 import carrier as carrier_module
from kvbaton.handoff.http2 import frames as h2
from kvbaton.handoff.http2.calls import ClientStream, StreamEndedError
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.http2.incoming import ServerStream
from kvbaton.handoff.http2.messages import Placement
from kvbaton.handoff.http2.server import Server, serving_kv
from kvbaton.rpc import serving as rpc_serving
from support.fakes import PATIENCE

METHOD = "/test.Test/Echo"
LARGE = bytes(range(256)) * 20_000


class Echo:
    """Answers each message with its length; what begins with P is placed, with ! it fails, with . it ends the call."""

    alive: "set[Echo]" = set()

    def __init__(self, stream: ServerStream) -> None:
        self.stream, self.ends, self.memory = stream, 0, bytearray()
        self.alive.add(self)

    def place(self, start: memoryview, size: int) -> Placement | None:
        if start[0] != ord("P"):
            return None
        self.memory = bytearray(size)
        self.memory[:1] = start[:1]
        return Placement(1, [memoryview(self.memory)[1:100], memoryview(self.memory)[100:]], self)

    def __enter__(self) -> None:
        """A guard that lets everything pass."""

    def __exit__(self, *_: object) -> None:
        pass

    def on_placed(self) -> None:
        self.on_message(bytes(self.memory))

    def on_message(self, message: bytes) -> None:
        if message.startswith(b"!"):
            raise NotFoundError("näh")
        if message.startswith(b"?"):
            raise ValueError("secret")
        if message.startswith(b"."):
            self.stream.end()
        self.stream.send(b"%d" % len(message) + message[-5:])

    def on_half_close(self) -> None:
        self.stream.end()

    def on_end(self) -> None:
        self.ends += 1
        assert self.ends == 1
        self.alive.discard(self)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    Echo.alive.clear()
    async with asyncio.timeout(PATIENCE), serving_kv({METHOD: Echo}, "127.0.0.1", 0) as serving:
        yield serving


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[Connection]:
    async with await Connection.open(server.address, PATIENCE) as opened:
        yield opened


async def exchange(call: ClientStream, message: bytes) -> bytes | None:
    await call.send([message[:7], message[7:]])
    return await call.receive()


async def all_ended() -> None:
    while Echo.alive:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("message", [b"", b"x", b"x" * 255, b"P" * 257, b"x" * 70_000, b"P" + LARGE, b"x" + LARGE])
async def test_messages_arrive_placed_or_whole(connection: Connection, message: bytes) -> None:
    call = connection.call(METHOD, PATIENCE)
    assert await exchange(call, message) == b"%d" % len(message) + message[-5:]
    assert await exchange(call, b"again") == b"5again"
    await call.send([b"last"], last=True)
    assert call.half_closed
    assert await call.receive() == b"4last"
    assert await call.receive() is None
    assert call.ended
    assert connection.num_streams == 0
    await all_ended()


@pytest.mark.parametrize(
    ("message", "error", "problem"),
    [(b"!", NotFoundError, "näh"), (b"?", UnavailableError, "internal error"), (b"." * 3, StreamEndedError, "")],
)
async def test_a_call_that_the_server_ends_says_how(
    connection: Connection, message: bytes, error: type[Exception], problem: str
) -> None:
    call = connection.call(METHOD, PATIENCE)
    await call.send([message])
    if error is StreamEndedError:
        assert await call.receive() is None
        with pytest.raises(StreamEndedError):
            await call.send([b"more"])
    else:
        with pytest.raises(error, match=problem):
            await call.receive()
    await all_ended()
    assert await exchange(connection.call(METHOD, PATIENCE), b"next") == b"4next"


async def test_a_method_that_nobody_serves_is_unimplemented(connection: Connection) -> None:
    with pytest.raises(UnavailableError, match="UNIMPLEMENTED: /test.Test/Other is not served here"):
        await connection.call("/test.Test/Other", PATIENCE).receive()


async def test_a_deadline_ends_a_call_on_both_sides(connection: Connection) -> None:
    call = connection.call(METHOD, 0.05)
    with pytest.raises(TimeoutError, match="deadline exceeded"):
        await call.receive()
    with pytest.raises(StreamEndedError):
        await call.send([b"late"])
    await all_ended()


async def test_a_cancelled_call_ends_at_the_server(connection: Connection) -> None:
    call = connection.call(METHOD, None)
    await exchange(call, b"x")
    call.cancel()
    await all_ended()
    with pytest.raises(UnavailableError, match="CANCELLED"):
        await call.receive()


async def test_the_servers_end_is_the_calls_end(connection: Connection, server: Server) -> None:
    call = connection.call(METHOD, PATIENCE)
    await exchange(call, b"x")
    server.close()
    with pytest.raises(UnavailableError, match="is unavailable"):
        await call.receive()
    assert not Echo.alive
    assert connection.closed
    with pytest.raises(UnavailableError, match="the connection has ended"):
        connection.call(METHOD, PATIENCE)


async def test_a_caller_that_goes_as_the_connection_is_made_leaves_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Connection] = []
    settle = Connection._on_settled

    def settle_too_late(connection: Connection) -> None:
        opened.append(connection)
        settle(connection)
        opening.cancel()

    monkeypatch.setattr(Connection, "_on_settled", settle_too_late)
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(Connection.open(server.address, PATIENCE))
    assert opening.cancelled()
    assert [connection.closed for connection in opened] == [True]


async def test_nobody_and_no_http2_are_unavailable(server: Server) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UnavailableError, match="gave no answer for 0.05 s"):
            await Connection.open(f"127.0.0.1:{port}", 0.05)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await Connection.open(f"127.0.0.1:{port}", PATIENCE)
    with pytest.raises(StartupError, match="address already in use"):
        async with serving_kv({}, "127.0.0.1", server.port):
            pass


async def test_calls_share_a_connection_message_by_message(connection: Connection) -> None:
    small, large = connection.call(METHOD, PATIENCE), connection.call(METHOD, PATIENCE)

    async def send_much() -> None:
        for _ in range(10):
            await large.send([b"P" + LARGE])

    async with asyncio.TaskGroup() as group:
        sending = group.create_task(send_much())
        while not sending.done():
            assert await exchange(small, b"quick") == b"5quick"
    for _ in range(10):
        assert await large.receive() == b"%d" % (len(LARGE) + 1) + LARGE[-5:]


async def test_a_send_that_is_cancelled_leaves_the_connection_whole(connection: Connection) -> None:
    other = connection.call(METHOD, PATIENCE)
    for _ in range(5):
        call = connection.call(METHOD, PATIENCE)
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(call.send([b"x" + LARGE] * 3))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            sending.cancel()
        assert await exchange(other, b"fine") == b"4fine"
    assert connection.num_streams == 1


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, h2.PREFACE + b"\xff" * 1000])
async def test_garbage_ends_its_connection_alone(connection: Connection, server: Server, garbage: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(garbage)
    answer = await reader.read()
    assert h2.parse_header(answer[:9]).kind == h2.Kind.SETTINGS
    writer.close()
    assert await exchange(connection.call(METHOD, PATIENCE), b"fine") == b"4fine"


@asynccontextmanager
async def mute_peer() -> AsyncIterator[tuple[str, Callable[[], int]]]:
    """A server that greets and then says nothing; its address and how many bytes it has seen."""
    seen = 0

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        writer.write(h2.settings_frame({}))
        try:
            while data := await reader.read(1 << 16):
                seen += len(data)
        finally:
            writer.close()

    listening = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", lambda: seen


async def test_a_peer_that_answers_no_ping_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_module, "TICK_SECONDS", 0.005)
    async with asyncio.timeout(PATIENCE), mute_peer() as (address, seen):
        connection = await Connection.open(address, PATIENCE)
        with pytest.raises(UnavailableError, match="answered no ping for 10 s"):
            await connection.call(METHOD, None).receive()
        assert connection.closed
        assert seen() > 0


async def test_peers_that_answer_pings_stay(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_module, "TICK_SECONDS", 0.002)
    async with await Connection.open(server.address, PATIENCE) as connection:
        call = connection.call(METHOD, PATIENCE)
        await asyncio.sleep(0.3)
        assert await exchange(call, b"still") == b"5still"


async def test_a_peer_that_takes_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_module, "TICK_SECONDS", 0.005)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def accept() -> socket.socket:
            accepted, _ = listening.accept()
            window: dict[int, int] = {h2.Setting.INITIAL_WINDOW_SIZE: h2.MAX_WINDOW}
            accepted.sendall(h2.settings_frame(window) + h2.window_frame(0, 1 << 30))
            return accepted

        accepting = asyncio.get_running_loop().run_in_executor(None, accept)
        connection = await Connection.open(f"127.0.0.1:{listening.getsockname()[1]}", PATIENCE)
        with closing(await accepting):
            call = connection.call(METHOD, None)

            async def send_without_end() -> None:
                while True:
                    await call.send([LARGE])

            async with asyncio.timeout(PATIENCE):
                with pytest.raises(StreamEndedError):
                    await send_without_end()
                with pytest.raises(UnavailableError, match="took no byte for 10 s"):
                    await call.receive()


async def test_grpcio_calls_our_server(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.stream_stream(METHOD)(timeout=PATIENCE)
        for message in (b"", b"x", b"P" + LARGE, b"x" + LARGE):
            await call.write(message)
            assert await call.read() == b"%d" % len(message) + message[-5:]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        failing: Any = channel.stream_stream(METHOD)(timeout=PATIENCE)
        await failing.write(b"!")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await failing.read()
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "näh")
        other: Any = channel.stream_stream("/test.Test/Other")(timeout=PATIENCE)
        assert await other.code() is grpc.StatusCode.UNIMPLEMENTED
        squeezed: Any = channel.stream_stream(METHOD)(timeout=PATIENCE, compression=grpc.Compression.Gzip)
        await squeezed.write(b"x" * 1000)
        assert await squeezed.code() is grpc.StatusCode.UNIMPLEMENTED
        too_large: Any = channel.stream_stream(METHOD)(timeout=PATIENCE)
        await too_large.write(bytes(rpc_serving.MAX_MESSAGE_BYTES + 1))
        assert await too_large.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await all_ended()


async def test_we_call_a_grpcio_server() -> None:
    async def echo(messages: AsyncIterator[bytes], context: Any) -> None:
        async for message in messages:
            if message == b"!":
                await context.abort(grpc.StatusCode.NOT_FOUND, "näh")
            # Slower than its client: the window closes.
            await asyncio.sleep(0.001)
            await context.write(b"%d" % len(message) + message[-5:])

    handler = grpc.method_handlers_generic_handler("test.Test", {"Echo": grpc.stream_stream_rpc_method_handler(echo)})
    registration = rpc_serving.Registration("test.Test", lambda served: served.add_generic_rpc_handlers((handler,)))
    async with (
        asyncio.timeout(PATIENCE),
        rpc_serving.serving([registration], "127.0.0.1", 0, grace_seconds=0) as served,
        await Connection.open(served.address, PATIENCE) as connection,
    ):
        call = connection.call(METHOD, PATIENCE)
        for message in (b"", b"x", LARGE, LARGE * 3):
            assert await exchange(call, message) == b"%d" % len(message) + message[-5:]
        await call.send([b"."], last=True)
        assert await call.receive() == b"1."
        assert await call.receive() is None
        failing = connection.call(METHOD, PATIENCE)
        await failing.send([b"!"])
        with pytest.raises(NotFoundError, match="näh"):
            await failing.receive()
        with pytest.raises(UnavailableError, match="UNIMPLEMENTED"):
            await connection.call("/test.Test/Other", PATIENCE).receive()
