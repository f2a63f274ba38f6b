"""A prefill worker, from its options to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.links import LinkTable
from kvbaton.handoff.sender import KvSender, SenderCounters
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.servicer import OutgoingTransfers, PrefillServicer
from kvbaton.rpc.serving import Registration, Server
from kvbaton.v1 import worker_pb2
from kvbaton.worker.config import WorkerConfig, encoding_of
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.service import Offer, serve_worker
from kvbaton.worker.transports import link_offer


class PrefillSide:
    """What a worker needs to offer PrefillService: the sending half of the hand-off."""

    def __init__(self, config: WorkerConfig, kv_encoding: str) -> None:
        """`kv_encoding` is what KV is sent in; empty for as it is."""
        self._config = config
        self._links: LinkTable | None = None
        self.kv_encoding = kv_encoding
        self.transfers = OutgoingTransfers()
        self.counters = SenderCounters()

    def describe(self, status: worker_pb2.WorkerStatus) -> None:
        """Add to the worker's status how it sends KV, and whom it is linked with."""
        status.kv_encoding = self.kv_encoding
        if self._links is not None:
            status.links.extend(self._links.report)

    @asynccontextmanager
    async def open(self, runtime: WorkerRuntime, kv_thread: LoopThread) -> AsyncIterator[Registration]:
        """Offer the service; links with decode workers end with it."""
        store = runtime.store.encoded(self.kv_encoding)
        sender = KvSender(store, runtime.model.fingerprint, runtime.host, self.counters)
        offer = link_offer(self._config, runtime, encoded=bool(self.kv_encoding))
        links = self._links = LinkTable(offer, Connection.open)
        async with kv_thread.running(links.run()):
            yield PrefillServicer(runtime, self.transfers, sender, links, kv_thread).registration


async def serve_prefill(config: PrefillConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Serve until `stop` is set, as `serve_worker` does."""
    side = PrefillSide(config, encoding_of(config.kv_encoding))
    offer = Offer(
        role=worker_pb2.WORKER_ROLE_PREFILL,
        limits=Limits(max_prefill_tokens=config.max_prefill_tokens, max_decode_seqs=0, max_waiting=config.max_waiting),
        services=[side.open],
        on_layer=side.transfers.layer_done,
        sent=side.counters,
        describe=[side.describe],
    )
    await serve_worker(config, offer, stop, started)
