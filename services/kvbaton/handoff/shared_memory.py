"""The shared_memory transport: a pool in host memory, shown to other processes of the host, and theirs opened here.

See `handoff.sharing`. The memory is a file without a name; whoever is to read it gets a read-only descriptor.
"""

import logging
import os

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.kv_store import ForeignPool, KvStore, SharedMemory
from kvbaton.engine.pool_layout import layout_problem
from kvbaton.handoff import wire
from kvbaton.handoff.choice import SHARED_MEMORY
from kvbaton.handoff.descriptors import DescriptorInbox, send_descriptor
from kvbaton.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)


class SharedMemoryPool:
    """A `SharedPool`: our pool, for receivers to map."""

    transport = SHARED_MEMORY

    def __init__(self, memory: SharedMemory) -> None:
        """`memory` is our store's `shared`."""
        self.probe_bytes = memory.layout.probe_bytes
        self._memory = memory

    def describe(self, hello: pb.LinkHello) -> None:
        """See `SharedPool.describe`."""
        hello.layout.CopyFrom(wire.layout_to_proto(self._memory.layout))

    async def hand_over(self, welcome: pb.LinkWelcome) -> None:
        """Pass the descriptor, and wait until the receiver has it. See `SharedPool.hand_over`."""
        if not welcome.descriptor_socket:
            raise UnavailableError("the receiver has no socket for the descriptor")
        await send_descriptor(welcome.descriptor_socket, welcome.link_id, self._memory.descriptor)

    def write_probe(self, pattern: bytes) -> None:
        """See `SharedPool.write_probe`."""
        self._memory.probe[: len(pattern)] = pattern


class SharedMemoryOpener:
    """A `PoolOpener` for senders of this host."""

    transport = SHARED_MEMORY

    def __init__(self, store: KvStore, inbox: DescriptorInbox | None = None) -> None:
        """`store` takes the copies, in host memory. `inbox` takes the descriptors."""
        self._store = store
        self._inbox = inbox or DescriptorInbox()

    def obstacle(self, hello: pb.LinkHello) -> str:
        """See `PoolOpener.obstacle`."""
        return layout_problem(wire.layout_from_proto(hello.layout), self._store.geometry) or ""

    def invite(self, link_id: bytes) -> str:
        """See `PoolOpener.invite`. On the loop that is to take the descriptor."""
        try:
            return self._inbox.expect(link_id)
        except UnavailableError as error:
            logger.warning("KV cannot be received by shared memory: %s", error)
            return ""

    def open(self, hello: pb.LinkHello, link_id: bytes) -> ForeignPool:
        """See `PoolOpener.open`. Any thread."""
        descriptor = self._inbox.collect(link_id)
        if descriptor is None:
            raise UnavailableError("the sender's memory: its descriptor has not come")
        try:
            return self._store.map_foreign(descriptor, wire.layout_from_proto(hello.layout))
        finally:
            os.close(descriptor)

    def forget(self, link_id: bytes) -> None:
        """See `PoolOpener.forget`. Any thread."""
        self._inbox.forget(link_id)
