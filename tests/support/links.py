"""Links without sockets: streams that are two queues, connections that a receiver's book answers, and fake pools."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kvbaton.engine.errors import KvbatonError, UnavailableError
from kvbaton.handoff.agreement import LinkOffer
from kvbaton.handoff.choice import AUTO, SHARED_MEMORY
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.incoming_links import LinkBook
from kvbaton.handoff.landing import fill
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import FakeStore

HOST = types.HostIdentity(boot_id="b1", network_namespace=7, gpu_uuids=["G1"])
PROBE_BYTES = 1000


class Memory:
    """What a sender and a receiver on one host both see: the sender's `source`, and where it lands."""

    def __init__(self, source: FakeStore | None = None, sink: FakeStore | None = None) -> None:
        self.source, self.sink = source or FakeStore(), sink or FakeStore()
        self.probe = bytearray(PROBE_BYTES)
        self.handed_over: set[bytes] = set()


class FakeSharedPool:
    """A sender's pool; `problem` is what handing it over raises."""

    def __init__(self, memory: Memory, transport: str = SHARED_MEMORY) -> None:
        self.memory = memory
        self.transport = transport
        self.probe_bytes = PROBE_BYTES
        self.problem: Exception | None = None
        self.damage = False

    def describe(self, hello: pb.LinkHello) -> None:
        block_size = self.memory.source.block_size
        hello.layout.CopyFrom(pb.PoolLayout(num_bytes=4096, block_size=block_size, probe_bytes=PROBE_BYTES))

    async def hand_over(self, welcome: pb.LinkWelcome) -> None:
        await asyncio.sleep(0)
        if self.problem is not None:
            raise self.problem
        self.memory.handed_over.add(welcome.link_id)

    def write_probe(self, pattern: bytes) -> None:
        self.memory.probe[:] = pattern
        if self.damage:
            self.memory.probe[len(pattern) // 2] ^= 1


class FakeForeignPool:
    """The sender's memory in the receiver's eyes. `before_copy` may wait; a device's has no checksums."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.closed = False
        self.checksums = True
        self.before_copy: Callable[[], None] = lambda: None
        self.during_probe: Callable[[], None] = lambda: None

    def probe(self, num_bytes: int) -> tuple[int, float]:
        assert not self.closed
        self.during_probe()
        return crc32c([bytes(self.memory.probe[:num_bytes])]), num_bytes / 8e9

    def copy(self, layers: range, theirs: Sequence[int], tokens: range, blocks: Sequence[int]) -> int | None:
        assert not self.closed
        self.before_copy()
        first = tokens.start // self.memory.source.block_size
        payload = b"".join(self.memory.source.read(layers, [0] * first + list(theirs), tokens))
        fill(self.memory.sink.landing(layers, blocks, tokens), payload)
        return crc32c([payload]) if self.checksums else None

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeOpener:
    """A receiver's side of one transport."""

    def __init__(self, memory: Memory, transport: str = SHARED_MEMORY) -> None:
        self.memory = memory
        self.transport = transport
        self.against = ""
        self.problem: Exception | None = None
        self.invited: list[bytes] = []
        self.forgotten: list[bytes] = []
        self.opened: list[FakeForeignPool] = []

    def obstacle(self, hello: pb.LinkHello) -> str:
        return self.against

    def invite(self, link_id: bytes) -> str:
        self.invited.append(link_id)
        return "a-socket"

    def open(self, hello: pb.LinkHello, link_id: bytes) -> FakeForeignPool:
        if self.problem is not None:
            raise self.problem
        if link_id not in self.memory.handed_over:
            raise UnavailableError("no descriptor has come")
        self.opened.append(FakeForeignPool(self.memory))
        return self.opened[-1]

    def forget(self, link_id: bytes) -> None:
        self.forgotten.append(link_id)


def offer(pools: Sequence[Any] = (), setting: str = AUTO, **host: Any) -> LinkOffer:
    """A sender's offer; `host` changes its identity."""
    return LinkOffer("p-1", _host(host), setting, pools)


def book(openers: Sequence[Any] = (), setting: str = AUTO, incarnation: str = "d-1", **host: Any) -> LinkBook:
    """A receiver's links."""
    return LinkBook(incarnation, _host(host), setting, openers)


def _host(changes: dict[str, Any]) -> types.HostIdentity:
    identity = types.HostIdentity()
    identity.CopyFrom(HOST)
    for name, value in changes.items():
        setattr(identity, name, value)
    return identity


class LinkedStream:
    """A sender's stream that a receiver's book answers at once, as a server does for one stream."""

    def __init__(self, receiver: LinkBook) -> None:
        self.link = receiver.begin()
        self.received: list[pb.LinkRequest] = []
        self.reply: Callable[[pb.LinkRequest], pb.LinkResponse | None] = self.link.on_message
        """What answers; a test may put something else in its place."""
        self.error: KvbatonError | None = None
        self.ended = False
        self._answers: asyncio.Queue[bytes | KvbatonError | None] = asyncio.Queue(16)

    async def send(self, parts: Sequence[Any], *, last: bool = False) -> None:
        request = pb.LinkRequest.FromString(b"".join(parts))
        self.received.append(request)
        try:
            answer = self.reply(request)
        except KvbatonError as error:
            self.end(error)
            return
        if answer is not None:
            self._answers.put_nowait(answer.SerializeToString())

    async def receive(self) -> bytes | None:
        answer = await self._answers.get()
        if isinstance(answer, KvbatonError):
            raise answer
        return answer

    def end(self, error: KvbatonError | None = None) -> None:
        """As when the receiver, or the connection, ends it."""
        if not self.ended:
            self.ended = True
            self.link.close()
            self._answers.put_nowait(error)

    def cancel(self) -> None:
        self.end()


class LinkedConnection:
    """A connection to a receiver's book."""

    def __init__(self, receiver: LinkBook) -> None:
        self.receiver = receiver
        self.streams: list[LinkedStream] = []
        self.closed = False

    def call(self, method: str, timeout: float | None) -> LinkedStream:
        assert method == "/kvbaton.v1.KvTransferService/Link"
        self.streams.append(LinkedStream(self.receiver))
        return self.streams[-1]

    async def close(self) -> None:
        self.closed = True
        for stream in self.streams:
            stream.end(UnavailableError("the connection was closed"))


class Network:
    """Receivers by endpoint; counts and holds connections."""

    def __init__(self, **receivers: LinkBook) -> None:
        self.receivers = dict(receivers)
        self.connections: dict[str, list[LinkedConnection]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def connect(self, endpoint: str, timeout: float) -> LinkedConnection:
        await self.gate.wait()
        receiver = self.receivers.get(endpoint)
        if receiver is None:
            raise UnavailableError("connection refused")
        connection = LinkedConnection(receiver)
        self.connections.setdefault(endpoint, []).append(connection)
        return connection
