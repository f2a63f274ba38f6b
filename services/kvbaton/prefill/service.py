"""A prefill worker, from its options to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.peers import PeerConnections
from kvbaton.handoff.sender import KvSender, SenderCounters
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.servicer import OutgoingTransfers, PrefillServicer
from kvbaton.rpc.serving import Registration, Server
from kvbaton.v1 import worker_pb2
from kvbaton.worker.config import encoding_of
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.service import Offer, serve_worker


class PrefillSide:
    """What a worker needs to offer PrefillService: the sending half of the hand-off."""

    def __init__(self, kv_encoding: str) -> None:
        """`kv_encoding` is what KV is sent in; empty for as it is."""
        self.kv_encoding = kv_encoding
        self.transfers = OutgoingTransfers()
        self.counters = SenderCounters()

    def describe(self, status: worker_pb2.WorkerStatus) -> None:
        """Add to the worker's status how it sends KV."""
        status.kv_encoding = self.kv_encoding

    @asynccontextmanager
    async def open(self, runtime: WorkerRuntime, kv_thread: LoopThread) -> AsyncIterator[Registration]:
        """Offer the service; connections to decode workers are closed at the end."""
        sender = KvSender(
            runtime.store.encoded(self.kv_encoding), runtime.model.fingerprint, runtime.host, self.counters
        )
        peers = PeerConnections()
        try:
            yield PrefillServicer(runtime, self.transfers, sender, peers, kv_thread).registration
        finally:
            await kv_thread.call(peers.close())


async def serve_prefill(config: PrefillConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Serve until `stop` is set, as `serve_worker` does."""
    side = PrefillSide(encoding_of(config.kv_encoding))
    offer = Offer(
        role=worker_pb2.WORKER_ROLE_PREFILL,
        limits=Limits(max_prefill_tokens=config.max_prefill_tokens, max_decode_seqs=0, max_waiting=config.max_waiting),
        services=[side.open],
        on_layer=side.transfers.layer_done,
        sent=side.counters,
        describe=[side.describe],
    )
    await serve_worker(config, offer, stop, started)
