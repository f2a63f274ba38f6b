"""A prefill worker, from its options to its end."""

import asyncio
import logging

from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.peers import PeerChannels
from kvbaton.handoff.sender import KvSender, SenderCounters
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.servicer import OutgoingTransfers, PrefillServicer
from kvbaton.rpc.serving import Server, channel, new_event_loop, probe, serving
from kvbaton.v1 import worker_pb2
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import load_runtime
from kvbaton.worker.status import WorkerServicer

logger = logging.getLogger(__name__)


async def serve_prefill(config: PrefillConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Load, serve until `stop` is set, drain. `started` gets the server when it listens.

    Raises StartupError when the worker cannot start.
    """
    await probe(config.host, config.port)
    limits = Limits(max_prefill_tokens=config.max_prefill_tokens, max_decode_seqs=0, max_waiting=config.max_waiting)
    transfers, counters = OutgoingTransfers(), SenderCounters()
    runtime = await load_runtime(config, limits, transfers.layer_done)
    sender = KvSender(runtime.store, runtime.model.fingerprint, runtime.host, counters)
    peers = PeerChannels(channel)
    async with LoopThread("kv", new_event_loop) as kv_thread:
        with runtime.engine:
            servicer = PrefillServicer(runtime, transfers, sender, peers, kv_thread)
            status = WorkerServicer(worker_pb2.WORKER_ROLE_PREFILL, runtime, counters, stop)
            services = [servicer.registration, status.registration]
            async with serving(services, config.host, config.port, grace_seconds=config.grace_seconds) as server:
                logger.info("prefill worker ready on %s, serving %s", server.address, runtime.model.name)
                started.set_result(server)
                await runtime.engine.serve_until(stop)
        await kv_thread.call(peers.close())
