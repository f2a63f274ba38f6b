"""A decode worker, from its options to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.servicer import DecodeServicer
from kvbaton.engine.errors import StartupError
from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.rpc.serving import Registration, Server, check_peer, probe
from kvbaton.v1 import worker_pb2
from kvbaton.worker.loop_thread import LoopThread, entered_on
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.service import Offer, serve_worker


class DecodeSide:
    """What a worker needs to offer DecodeService: the receiving half of the hand-off, on a port of its own."""

    def __init__(self, config: DecodeConfig) -> None:
        self.counters = ReceiverCounters()
        self._config = config
        self._kv_port = 0

    async def check(self) -> None:
        """Raises StartupError for what cannot work, before a model is loaded."""
        config = self._config
        if config.kv_endpoint:
            check_peer("kv-endpoint", config.kv_endpoint)
        if config.kv_port == config.port != 0:
            raise StartupError(f"--kv-port: {config.kv_port} is --port already")
        await probe(config.host, config.kv_port)

    @asynccontextmanager
    async def open(self, runtime: WorkerRuntime, kv_thread: LoopThread) -> AsyncIterator[Registration]:
        """Offer the service, and KvTransferService beside it."""
        config, book = self._config, TicketBook(runtime.store.engine_follows_landings)
        receiver = KvTransferServicer(
            lambda: IncomingTransfer(book, runtime.store, runtime.model.fingerprint, self.counters), self.counters
        )
        kv_serving = serving_kv(receiver.methods, config.host, config.kv_port)
        async with entered_on(kv_thread, kv_serving) as kv_server:
            self._kv_port = kv_server.port
            yield DecodeServicer(runtime, book, kv_server.port, config.kv_endpoint).registration

    def describe(self, status: worker_pb2.WorkerStatus) -> None:
        """Tell in a worker's status where KV is taken."""
        status.kv_port, status.kv_endpoint = self._kv_port, self._config.kv_endpoint


async def serve_decode(config: DecodeConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Serve until `stop` is set, as `serve_worker` does."""
    side = DecodeSide(config)
    await side.check()
    offer = Offer(
        role=worker_pb2.WORKER_ROLE_DECODE,
        limits=Limits(max_prefill_tokens=0, max_decode_seqs=config.max_decode_seqs, max_waiting=config.max_waiting),
        services=[side.open],
        received=side.counters,
        describe=[side.describe],
    )
    await serve_worker(config, offer, stop, started)
