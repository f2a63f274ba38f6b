"""A decode worker, from its options to its end."""

import asyncio
import logging

from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.servicer import DecodeServicer
from kvbaton.engine.errors import StartupError
from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.handoff.servicer import SERVICE_NAME, KvTransferServicer
from kvbaton.rpc.serving import Registration, Server, check_peer, new_event_loop, probe, serving
from kvbaton.v1 import worker_pb2
from kvbaton.worker.loop_thread import LoopThread, entered_on
from kvbaton.worker.runtime import load_runtime
from kvbaton.worker.status import WorkerServicer

logger = logging.getLogger(__name__)


async def serve_decode(config: DecodeConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Load, serve until `stop` is set, drain. `started` gets the server when it listens.

    Raises StartupError when the worker cannot start.
    """
    if config.kv_endpoint:
        check_peer("kv-endpoint", config.kv_endpoint)
    if config.kv_port == config.port != 0:
        raise StartupError(f"--kv-port: {config.kv_port} is --port already")
    for port in (config.port, config.kv_port):
        await probe(config.host, port)
    limits = Limits(max_prefill_tokens=0, max_decode_seqs=config.max_decode_seqs, max_waiting=config.max_waiting)
    runtime = await load_runtime(config, limits, None)
    book, counters = TicketBook(), ReceiverCounters()
    receiver = KvTransferServicer(
        lambda: IncomingTransfer(book, runtime.store, runtime.model.fingerprint, counters), counters
    )
    kv_service = [Registration(SERVICE_NAME, receiver.add_to)]
    kv_serving = serving(kv_service, config.host, config.kv_port, grace_seconds=0)
    # KV outlives the token streams while they drain: some of them may still wait for theirs.
    async with LoopThread("kv", new_event_loop) as kv_thread, entered_on(kv_thread, kv_serving) as kv_server:
        with runtime.engine:
            servicer = DecodeServicer(runtime, book, kv_server.port, config.kv_endpoint)
            status = WorkerServicer(worker_pb2.WORKER_ROLE_DECODE, runtime, counters, stop)
            services = [servicer.registration, status.registration]
            async with serving(services, config.host, config.port, grace_seconds=config.grace_seconds) as server:
                logger.info("decode worker ready on %s, serving %s", server.address, runtime.model.name)
                started.set_result(server)
                await runtime.engine.serve_until(stop)
