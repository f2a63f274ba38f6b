"""A TCP proxy between a prefill worker and a decode worker that changes what passes, message by message.

It knows HTTP/2 frames, the path of each call, and gRPC messages. Both peers' flow control ends here, since an edited
stream is longer or shorter than what its sender counted: the proxy opens the sender's windows again as it takes bytes,
and keeps to the receiver's when it passes them on.
"""

import asyncio
import enum
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from hpack import Decoder

from kvbaton.v1 import kv_transfer_pb2 as pb
from support import http2_frames as http2
from support.http2_frames import Http2Frame


class Then(enum.Enum):
    """What happens to the stream, or its connection, after a message has passed."""

    GO_ON = enum.auto()
    HOLD = enum.auto()
    """Nothing more of this stream passes in this direction; the connection lives, and its pings."""
    FREEZE = enum.auto()
    """Nothing passes in either direction any more, and nobody is told: a peer that was stopped, a cable pulled."""
    CLOSE = enum.auto()
    """Both connections are closed."""
    RESET = enum.auto()
    """Both connections are torn down."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A message on its way."""

    kind: str
    """Its name in `TransferRequest`, `TransferResponse`, `LinkRequest` or `LinkResponse`; or other."""
    number: int
    """Counts the messages of the kind that the proxy has seen since it was struck, from 0, over all connections."""
    data: bytes
    """Without gRPC's prefix."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What becomes of it."""

    data: bytes
    """With gRPC's prefixes, if it is messages at all."""
    then: Then = Then.GO_ON
    delay: float = 0.0
    """Seconds before it goes."""


Edit = Callable[[Passing], Passed]


def unchanged(message: Passing) -> Passed:
    """What a proxy does that was told nothing."""
    return Passed(http2.grpc_message(message.data))


class FaultProxy:
    """The proxy. What passes is left alone until `strike`."""

    def __init__(self) -> None:
        self._requests: Edit = unchanged
        self._responses: Edit = unchanged
        self.upstream = ""
        """host:port of the decode worker."""
        self.endpoint = ""
        """host:port that stands in for it."""
        self.connect_delay = 0.0
        """Seconds that a new connection's first byte takes."""
        self.num_connections = 0
        """Open now."""
        self._numbers: dict[str, int] = defaultdict(int)
        self._connections: set[_Connection] = set()

    def seen(self, kind: str) -> int:
        """How many messages of a kind have come here."""
        return self._numbers[kind]

    def edit(self, path: str, responses: bool, data: bytes) -> Passed:
        """The fate of one message of a call of `path`."""
        kind = _kind(path, responses, data)
        number = self._numbers[kind]
        self._numbers[kind] += 1
        return (self._responses if responses else self._requests)(Passing(kind, number, data))

    def strike(self, edit: Edit, *, responses: bool = False) -> None:
        """Edit one way's messages from now on, counted from 0 again."""
        self.spare()
        if responses:
            self._responses = edit
        else:
            self._requests = edit

    def spare(self) -> None:
        """Leave what passes alone again."""
        self._requests = self._responses = unchanged
        self._numbers.clear()

    def cut(self, *, reset: bool) -> None:
        """End all connections, orderly or not."""
        for connection in list(self._connections):
            connection.end(reset=reset)

    def freeze(self) -> None:
        """Stop all traffic of the connections that there are, in silence."""
        for connection in self._connections:
            connection.flowing.clear()

    def thaw(self) -> None:
        """Let it go on."""
        for connection in self._connections:
            connection.flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end."""
        self.num_connections += 1
        try:
            await asyncio.sleep(self.connect_delay)
            host, _, port = self.upstream.rpartition(":")
            connection = _Connection(self, (reader, writer), await asyncio.open_connection(host, int(port)))
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        except OSError:
            # Nobody listens there, and whoever asked has to see it.
            writer.transport.abort()
        finally:
            writer.close()
            self.num_connections -= 1


class _Connection:
    """Two sockets and the two directions between them."""

    def __init__(
        self,
        proxy: FaultProxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._writers = (client[1], server[1])
        self._paths: dict[int, str] = {}
        self._headers = Decoder()

        def edit(stream: int, responses: bool, data: bytes) -> Passed:
            return proxy.edit(self._paths[stream], responses, data)

        self.forth = _Direction(self, lambda stream, data: edit(stream, False, data), client, server[1])
        self.back = _Direction(self, lambda stream, data: edit(stream, True, data), server, client[1])
        self.forth.opposite, self.back.opposite = self.back, self.forth

    def begin(self, frame: Http2Frame) -> None:
        """A client's call; its headers are small enough for one frame."""
        headers = {str(name): str(value) for name, value in self._headers.decode(frame.fragment)}
        self._paths.setdefault(frame.stream, headers.get(":path", ""))

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                directions = [group.create_task(self.forth.run(preface=True)), group.create_task(self.back.run())]
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                for direction in directions:
                    direction.cancel()
        finally:
            self.end(reset=False)

    def end(self, *, reset: bool) -> None:
        for writer in self._writers:
            connected: socket.socket = writer.get_extra_info("socket")
            if reset and connected.fileno() >= 0:
                # Closing with nothing to linger for sends RST instead of FIN.
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if reset:
                writer.transport.abort()
            else:
                writer.close()


class _Direction:
    """One way of a connection: frames in, the same or others out."""

    def __init__(
        self,
        connection: _Connection,
        edit: Callable[[int, bytes], Passed],
        source: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        sink: asyncio.StreamWriter,
    ) -> None:
        self.opposite: _Direction
        self._connection = connection
        self._edit = edit
        self._reader, self._back = source
        self._sink = sink
        self._messages: dict[int, http2.MessageAssembler] = defaultdict(http2.MessageAssembler)
        self._held: set[int] = set()
        self._initial = http2.INITIAL_WINDOW
        self._windows: dict[int, int] = {0: http2.INITIAL_WINDOW}
        self._opened = asyncio.Event()

    async def run(self, *, preface: bool = False) -> None:
        """Until either end is gone."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            if preface:
                self._sink.write(await self._reader.readexactly(len(http2.PREFACE)))
            while True:
                frame = await http2.read_frame(self._reader)
                await self._connection.flowing.wait()
                await self._pass(frame)
                await self._sink.drain()

    async def _pass(self, frame: Http2Frame) -> None:
        match frame.kind:
            case http2.DATA:
                await self._pass_data(frame)
            case http2.WINDOW_UPDATE:
                self.opposite.grant(frame.stream, int.from_bytes(frame.payload, "big"))
            case _:
                if frame.kind == http2.SETTINGS and not frame.flags & http2.ACK:
                    self.opposite.settle(frame.payload)
                    self._sink.write(_small_windows(frame.payload))
                    return
                if frame.kind == http2.HEADERS and self is self._connection.forth:
                    self._connection.begin(frame)
                if frame.kind == http2.RST_STREAM or frame.stream not in self._held:
                    self._sink.write(frame.encoded())

    def grant(self, stream: int, size: int) -> None:
        """The receiver takes `size` bytes more."""
        self._windows[stream] = self._windows.get(stream, self._initial) + size
        self._opened.set()

    def settle(self, payload: bytes) -> None:
        """The receiver's settings."""
        for identifier, value in http2.read_settings(payload):
            if identifier == http2.SETTINGS_INITIAL_WINDOW_SIZE:
                for stream in self._windows:
                    self._windows[stream] += (value - self._initial) if stream else 0
                self._initial = value
        self._opened.set()

    async def _pass_data(self, frame: Http2Frame) -> None:
        await self._pass_messages(frame)
        # Not before: its sender has no more on its way than the window says. A held stream gets no more leave at all.
        if frame.payload:
            self._back.write(http2.window_update(0, len(frame.payload)))
        if frame.payload and frame.stream not in self._held:
            self._back.write(http2.window_update(frame.stream, len(frame.payload)))

    async def _pass_messages(self, frame: Http2Frame) -> None:
        for message in self._messages[frame.stream].feed(frame.content):
            if frame.stream in self._held:
                return
            passed = self._edit(frame.stream, message)
            await asyncio.sleep(passed.delay)
            await self._send(frame.stream, passed.data)
            await self._sink.drain()
            match passed.then:
                case Then.HOLD:
                    self._held.add(frame.stream)
                case Then.FREEZE:
                    self._connection.flowing.clear()
                    await self._connection.flowing.wait()
                case Then.CLOSE | Then.RESET:
                    self._connection.end(reset=passed.then is Then.RESET)
        if frame.flags & http2.END_STREAM and frame.stream not in self._held:
            self._sink.write(Http2Frame(http2.DATA, http2.END_STREAM, frame.stream, b"").encoded())

    async def _send(self, stream: int, data: bytes) -> None:
        """Write `data` as DATA frames, as fast as the receiver's windows open."""
        position = 0
        self._windows.setdefault(stream, self._initial)
        while position < len(data):
            size = min(http2.MAX_FRAME, len(data) - position, self._windows[0], self._windows[stream])
            if size <= 0:
                self._opened.clear()
                await self._opened.wait()
                continue
            self._windows[0] -= size
            self._windows[stream] -= size
            self._sink.write(Http2Frame(http2.DATA, 0, stream, data[position : position + size]).encoded())
            position += size


def _small_windows(payload: bytes) -> bytes:
    """Settings without the window that they ask for: here it is the smallest that all peers know."""
    kept = [pair for pair in http2.read_settings(payload) if pair[0] != http2.SETTINGS_INITIAL_WINDOW_SIZE]
    return http2.settings(*kept)


def _kind(path: str, responses: bool, data: bytes) -> str:
    message: pb.TransferRequest | pb.TransferResponse | pb.LinkRequest | pb.LinkResponse
    if path.endswith("/Link"):
        message = pb.LinkResponse() if responses else pb.LinkRequest()
    else:
        message = pb.TransferResponse() if responses else pb.TransferRequest()
    try:
        message.MergeFromString(data)
    except DecodeError:
        return "other"
    return message.WhichOneof("message") or "other"


@asynccontextmanager
async def fault_proxy(upstream: str = "") -> AsyncIterator[FaultProxy]:
    """A listening proxy; `upstream` may be set later, before the first connection."""
    proxy = FaultProxy()
    proxy.upstream = upstream
    async with asyncio.TaskGroup() as group:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = group.create_task(proxy.serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        proxy.endpoint = f"{host}:{port}"
        try:
            yield proxy
        finally:
            server.close()
            for task in tasks:
                task.cancel()
