"""The receiver's half of links: what it answers, and the senders' memory that it has open.

Life of a link: `LinkBook.begin` -> hello -> probes -> chosen -> transfers refer to it by its id ->
`IncomingLink.close`, when its stream ends, however it ends. A lock makes closing wait for a copy that runs, so that no
memory is unmapped under it; afterwards nothing is copied any more.
"""

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvbaton.engine.errors import (
    InvalidArgumentError,
    KvbatonError,
    OverloadedError,
    TransferRejectedError,
    UnavailableError,
)
from kvbaton.handoff.agreement import LINK_ID_BYTES
from kvbaton.handoff.choice import GRPC, allowed, receiver_obstacle
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.sharing import ForeignPool, PoolOpener
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types

MAX_LINKS = 1024
"""Most senders that may be linked at once."""

MAX_TRANSPORTS = 8
"""Most transports that a hello may offer."""


class LinkEndedError(TransferRejectedError):
    """A header refers to a link that is unknown here, or has ended: the sender may link anew and try again."""


@dataclass(slots=True)
class LinkBook:
    """All links of a receiving worker. Safe to use from several threads."""

    incarnation: str
    host: types.HostIdentity
    setting: str
    """`--transport`."""
    openers: Sequence[PoolOpener] = ()
    """The reference transports that its memory makes possible."""
    _links: "dict[bytes, IncomingLink]" = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._links)

    @property
    def possible(self) -> tuple[str, ...]:
        """The transports that the memory makes possible."""
        return (*(opener.transport for opener in self.openers), GRPC)

    @property
    def allowed(self) -> tuple[str, ...]:
        """Those of them that may be used."""
        return allowed(self.setting, self.possible)

    def begin(self) -> "IncomingLink":
        """A link whose stream has just been opened. Raises OverloadedError when there are too many."""
        link = IncomingLink(self, secrets.token_bytes(LINK_ID_BYTES))
        with self._lock:
            if len(self._links) >= MAX_LINKS:
                raise OverloadedError(f"{len(self._links)} links are open already")
            self._links[link.link_id] = link
        return link

    def find(self, link_id: bytes, transport: str) -> "IncomingLink":
        """The link over which `transport` was chosen. Raises LinkEndedError when there is none."""
        with self._lock:
            link = self._links.get(link_id)
        if link is None or link.chosen != transport:
            raise LinkEndedError(f"link_id: no link that has chosen {transport[:20]!r} has this id, or it has ended")
        return link

    def remove(self, link: "IncomingLink") -> None:
        """Forget a link. Removing twice is harmless."""
        with self._lock:
            self._links.pop(link.link_id, None)


class IncomingLink:
    """One link: answers its stream's messages, and lends the sender's memory to transfers."""

    def __init__(self, book: LinkBook, link_id: bytes) -> None:
        self.link_id = link_id
        self.chosen = ""
        """The transport, once the sender has said so."""
        self._book = book
        self._hello: pb.LinkHello | None = None
        self._passed: set[str] = set()
        self._invited: list[PoolOpener] = []
        self._pools: dict[str, ForeignPool] = {}
        self._obstacles: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False

    def on_message(self, request: pb.LinkRequest) -> pb.LinkResponse | None:
        """The answer to the sender's next message. Raises InvalidArgumentError for one that must not come now."""
        kind = request.WhichOneof("message")
        if self.chosen:
            raise InvalidArgumentError("link", f"{kind} after chosen")
        if kind == "hello":
            return pb.LinkResponse(welcome=self._welcome(request.hello))
        if self._hello is None:
            raise InvalidArgumentError("link", f"{kind} where hello must come")
        if kind == "probe":
            return pb.LinkResponse(probed=self._probed(self._hello, request.probe))
        if kind != "chosen":
            raise InvalidArgumentError("link", "an empty message")
        if request.chosen.transport not in self._passed:
            raise InvalidArgumentError("chosen.transport", f"{request.chosen.transport[:20]!r} has passed no probe")
        self._keep_only(request.chosen.transport)
        self.chosen = request.chosen.transport
        return None

    @contextlib.contextmanager
    def pool(self) -> Iterator[ForeignPool]:
        """The sender's memory, which stays open until the block ends.

        Raises TransferRejectedError when it is open no more.
        """
        with self._lock:
            pool = self._pools.get(self.chosen)
            if self._closed or pool is None:
                raise TransferRejectedError("the link to the sender's memory has ended")
            yield pool

    def blocks_of(self, tokens: range) -> int:
        """How many of the sender's blocks hold `tokens`, which are not none."""
        # Whoever opened the memory has checked its layout.
        block_size = self._hello.layout.block_size if self._hello is not None else 1
        return (tokens.stop - 1) // block_size - tokens.start // block_size + 1

    def close(self) -> None:
        """The link's stream has ended. Waits for a copy that runs; closing twice is harmless."""
        self._book.remove(self)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._close_pools(self._pools)
            for opener in self._invited:
                opener.forget(self.link_id)

    def _welcome(self, hello: pb.LinkHello) -> pb.LinkWelcome:
        if self._hello is not None:
            raise InvalidArgumentError("link", "a second hello")
        if len(hello.transports) > MAX_TRANSPORTS:
            raise InvalidArgumentError("hello.transports", f"{len(hello.transports)} are more than {MAX_TRANSPORTS}")
        self._hello = hello
        book, socket = self._book, ""
        openers = {opener.transport: opener for opener in book.openers}
        for transport in hello.transports:
            obstacle = receiver_obstacle(transport, book.allowed, book.possible, book.host, hello.host)
            opener = openers.get(transport)
            if not obstacle and opener is not None:
                obstacle = opener.obstacle(hello)
            if not obstacle and opener is not None and opener not in self._invited:
                self._invited.append(opener)
                socket = opener.invite(self.link_id) or socket
            self._obstacles[transport] = obstacle
        return pb.LinkWelcome(
            link_id=self.link_id,
            incarnation=book.incarnation,
            host=book.host,
            obstacles=[self._obstacles[transport] for transport in hello.transports],
            descriptor_socket=socket,
        )

    def _probed(self, hello: pb.LinkHello, probe: pb.LinkProbe) -> pb.LinkProbed:
        transport = probe.transport
        if self._obstacles.get(transport, "not offered"):
            raise InvalidArgumentError("probe.transport", f"{transport[:20]!r} was not agreed on")
        if not probe.num_bytes:
            raise InvalidArgumentError("probe.num_bytes", "0 bytes prove nothing")
        if transport == GRPC:
            arrived = len(probe.payload) == probe.num_bytes and crc32c([probe.payload]) == probe.crc32c
            seconds = 0.0
        else:
            if probe.num_bytes > hello.layout.probe_bytes:
                problem = f"{probe.num_bytes} bytes of a memory for probes of {hello.layout.probe_bytes}"
                raise InvalidArgumentError("probe.num_bytes", problem)
            try:
                found, seconds = self._probe(transport, hello, probe.num_bytes)
            except KvbatonError as error:
                return pb.LinkProbed(problem=str(error))
            arrived = found == probe.crc32c
        if not arrived:
            return pb.LinkProbed(problem=f"the pattern of {probe.num_bytes} bytes did not arrive as it was sent")
        self._passed.add(transport)
        return pb.LinkProbed(seconds=seconds)

    def _probe(self, transport: str, hello: pb.LinkHello, num_bytes: int) -> tuple[int, float]:
        with self._lock:
            if self._closed:
                raise UnavailableError("the link has ended")
            pool = self._pools.get(transport)
            if pool is None:
                opener = next(opener for opener in self._invited if opener.transport == transport)
                pool = self._pools[transport] = opener.open(hello, self.link_id)
            return pool.probe(num_bytes)

    def _keep_only(self, transport: str) -> None:
        with self._lock:
            self._close_pools({name: pool for name, pool in self._pools.items() if name != transport})

    def _close_pools(self, pools: dict[str, ForeignPool]) -> None:
        for name, pool in dict(pools).items():
            self._pools.pop(name, None)
            pool.close()
