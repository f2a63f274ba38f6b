"""Two ends of the hand-off with a faulty wire between them, and what must be as before when a fault is over."""

import asyncio
import gc
import os
import random
import time
import weakref
from collections.abc import AsyncIterator, Sequence, Sized
from contextlib import asynccontextmanager
from typing import Protocol

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import KvStore
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, SenderCounters, Target, TransferReport
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.v1 import types_pb2 as types
from support.connections import PeerConnections
from support.fakes import GEOMETRY, PATIENCE, FakeStore, fingerprint
from support.fault_proxy import FaultProxy, fault_proxy

SETTLE_SECONDS = 10.0
"""How soon everything is as before."""


TOKENS = range(3, 43)
"""What a transfer moves, of the fakes' model."""


def num_descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def mappings() -> list[str]:
    """Lines that describe the areas of this process's memory."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return list(maps)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Store(KvStore, Protocol):
    """A store whose content a test can make and compare."""

    writes: list[tuple[range, range]]
    block_size: int

    def fill(self, layer: int, blocks: Sequence[int], tokens: range) -> None:
        """Put random KV there."""
        ...

    def content(self, blocks: Sequence[int], tokens: range) -> bytes:
        """The KV of `tokens` in all layers."""
        ...


class Ends:
    """A sender, a receiver, and a proxy between them."""

    def __init__(self, proxy: FaultProxy, source: Store, sink: Store, num_blocks: int) -> None:
        self.proxy = proxy
        self.book, self.applied = TicketBook(), list[int]()
        self.source, self.sink = source, sink
        self.num_blocks = num_blocks
        self.sent, self.received = SenderCounters(), ReceiverCounters()
        self.attempts: weakref.WeakSet[IncomingTransfer] = weakref.WeakSet()
        """What the receiver holds."""
        self.peers = PeerConnections()

    def new_attempt(self) -> IncomingTransfer:
        """The receiving half of one attempt."""
        transfer = IncomingTransfer(self.book, self.sink, fingerprint(), self.received)
        self.attempts.add(transfer)
        return transfer

    def reserve(self, tokens: range, rng: random.Random) -> Reservation:
        """Blocks in any order, with a ticket."""
        blocks = rng.sample(range(self.num_blocks), -(-tokens.stop // self.sink.block_size))
        return self.book.open(blocks, tokens, 1000, self.applied.append)

    def compute(self, tokens: range) -> OutgoingTransfer:
        """KV that is ready to leave."""
        outgoing = OutgoingTransfer(self.source.geometry, tokens)
        blocks = list(range(-(-tokens.stop // self.source.block_size)))
        for layer in range(self.source.geometry.num_layers):
            self.source.fill(layer, blocks, tokens)
            outgoing.layer_ready(layer, tokens.stop, blocks)
        outgoing.first_token(77)
        return outgoing

    def again(self, tokens: range) -> OutgoingTransfer:
        """The same KV once more."""
        outgoing = OutgoingTransfer(self.source.geometry, tokens)
        outgoing.cached(tokens.stop, list(range(-(-tokens.stop // self.source.block_size))))
        outgoing.first_token(77)
        return outgoing

    async def send(
        self, reservation: Reservation, outgoing: OutgoingTransfer, attempt: int = 1, timeout: float = PATIENCE
    ) -> TransferReport:
        """One attempt."""
        target = Target(
            endpoint=self.proxy.endpoint, ticket=reservation.ticket, attempt=attempt, tokens=reservation.tokens
        )
        sender = KvSender(self.source, fingerprint(), types.HostIdentity(boot_id="b"), self.sent)
        async with asyncio.timeout(PATIENCE * 2):
            connection = await self.peers.get(self.proxy.endpoint)
            return await sender.send(connection, target, outgoing, timeout)

    async def undisturbed(self, rng: random.Random) -> int:
        """Make the connection by a transfer without faults, and return of how many frames it was."""
        reservation = self.reserve(TOKENS, rng)
        report = await self.send(reservation, self.compute(TOKENS))
        assert self.arrived(reservation)
        assert self.applied == [77]
        self.applied.clear()
        return report.frames

    @asynccontextmanager
    async def reconnected(self) -> AsyncIterator[None]:
        """Send over a connection of its own within the block, as another prefill worker would."""
        ordinary, self.peers = self.peers, PeerConnections()
        try:
            yield
        finally:
            await self.peers.close()
            self.peers = ordinary

    def arrived(self, reservation: Reservation) -> bool:
        """Whether the reserved blocks hold what was computed."""
        tokens = reservation.tokens
        source = list(range(-(-tokens.stop // self.source.block_size)))
        return self.sink.content(reservation.blocks, tokens) == self.source.content(source, tokens)


@asynccontextmanager
async def ends(geometry: KvGeometry = GEOMETRY, num_blocks: int = 96, *, direct: bool = False) -> AsyncIterator[Ends]:
    """Both ends, connected through a proxy that leaves everything as it is, or directly."""
    async with fault_proxy() as proxy:
        made = Ends(proxy, FakeStore(geometry, num_blocks), FakeStore(geometry, num_blocks), num_blocks)
        servicer = KvTransferServicer(made.new_attempt, made.received)
        async with serving_kv(servicer.methods, "127.0.0.1", 0) as server:
            proxy.upstream = server.address
            if direct:
                proxy.endpoint = server.address
            try:
                yield made
            finally:
                await made.peers.close()


async def settled(held: Sized, descriptors: int) -> None:
    """Wait until the receiver holds none of its attempts and the process has no more descriptors than before."""
    found: tuple[int, int] = (0, 0)
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                begin = time.monotonic()
                gc.collect()
                found = (len(held), num_descriptors())
                if found[0] == 0 and found[1] <= descriptors:
                    return
                # Most of the time is the loop's, however large the heap is that was looked through.
                await asyncio.sleep(0.02 + 5 * (time.monotonic() - begin))
    except TimeoutError:
        raise AssertionError(
            f"{found[0]} attempts are held, {found[1]} descriptors open, {descriptors} before"
        ) from None
