"""Both ends of the hand-off on one host: real pools, one mapped by the other, with a faulty wire beside them."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import Landing
from kvbaton.handoff.agreement import LinkOffer
from kvbaton.handoff.choice import AUTO
from kvbaton.handoff.host import host_identity
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.incoming_links import LinkBook
from kvbaton.handoff.landing import fill
from kvbaton.handoff.link_call import LinkCall
from kvbaton.handoff.links import LINK_METHOD, LinkTable
from kvbaton.handoff.receiver import IncomingTransfer, Reservation
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, Target, TransferReport
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.handoff.shared_memory import SharedMemoryOpener, SharedMemoryPool
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import types_pb2 as types
from support.chaos import Ends
from support.fakes import BLOCK_SIZE, GEOMETRY, PATIENCE, fingerprint
from support.fault_proxy import FaultProxy, fault_proxy


class PoolStore(TorchKvStore):
    """A real pool with a fake's ways to look at it."""

    def __init__(self, geometry: KvGeometry, num_blocks: int, *, shared: bool = False) -> None:
        super().__init__(geometry, num_blocks, BLOCK_SIZE, torch.device("cpu"), shared=shared)
        self.writes: list[tuple[range, range]] = []
        self.warm_up()

    def fill(self, layer: int, blocks: Sequence[int], tokens: range) -> None:
        """Put random KV there."""
        layers = range(layer, layer + 1)
        payload = secrets.token_bytes(self.geometry.span_bytes(layer, layer + 1, len(tokens)))
        fill(super().landing(layers, blocks, tokens), payload)

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """See `KvStore.landing`; noted."""
        self.writes.append((layers, tokens))
        return super().landing(layers, blocks, tokens)

    def content(self, blocks: Sequence[int], tokens: range) -> bytes:
        """The KV of `tokens` in all layers."""
        return b"".join(self.read(range(self.geometry.num_layers), blocks, tokens))


class LinkedEnds(Ends):
    """Ends whose KV travels by shared memory."""

    def __init__(self, proxy: FaultProxy, geometry: KvGeometry, num_blocks: int, setting: str) -> None:
        source, sink = PoolStore(geometry, num_blocks, shared=True), PoolStore(geometry, num_blocks)
        super().__init__(proxy, source, sink, num_blocks)
        assert source.shared is not None
        self.links = LinkBook("d", host_identity(), setting, [SharedMemoryOpener(sink)])
        self._offer = LinkOffer("p", host_identity(), setting, [SharedMemoryPool(source.shared)])
        self.table = self.new_table()

    def new_table(self) -> LinkTable:
        """Another sender's links."""
        return LinkTable(self._offer, Connection.open)

    def new_attempt(self) -> IncomingTransfer:
        """The receiving half of one attempt."""
        transfer = IncomingTransfer(self.book, self.sink, fingerprint(), self.received, self.links)
        self.attempts.add(transfer)
        return transfer

    async def send(
        self, reservation: Reservation, outgoing: OutgoingTransfer, attempt: int = 1, timeout: float = PATIENCE
    ) -> TransferReport:
        """One attempt, over whatever the link has chosen."""
        endpoint = self.proxy.endpoint
        target = Target(endpoint=endpoint, ticket=reservation.ticket, attempt=attempt, tokens=reservation.tokens)
        sender = KvSender(self.source, fingerprint(), types.HostIdentity(boot_id="b"), self.sent)
        async with asyncio.timeout(PATIENCE * 2), self.table.using(endpoint) as link:
            return await sender.send(link.connection, target, outgoing, timeout, link.agreement)

    @asynccontextmanager
    async def reconnected(self) -> AsyncIterator[None]:
        """Send over another link within the block."""
        ordinary, self.table = self.table, self.new_table()
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self.table.run())
            yield
            keeping.cancel()
        self.table = ordinary

    async def link(self) -> str:
        """Agree on a transport now, and return it."""
        return (await self.table.connect(self.proxy.endpoint)).transport


@asynccontextmanager
async def linked_ends(
    geometry: KvGeometry = GEOMETRY, num_blocks: int = 96, *, setting: str = AUTO, direct: bool = False
) -> AsyncIterator[LinkedEnds]:
    """Both ends, linked when a transfer first needs it."""
    async with fault_proxy() as proxy:
        made = LinkedEnds(proxy, geometry, num_blocks, setting)
        servicer = KvTransferServicer(made.new_attempt, made.received)
        methods = {**servicer.methods, LINK_METHOD: lambda stream: LinkCall(made.links, stream)}
        async with serving_kv(methods, "127.0.0.1", 0) as server, asyncio.TaskGroup() as group:
            proxy.upstream = server.address
            if direct:
                proxy.endpoint = server.address
            keeping = group.create_task(made.table.run())
            try:
                yield made
            finally:
                keeping.cancel()
