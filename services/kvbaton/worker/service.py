"""A worker from its options to its end, whichever services it offers."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field

from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.receiver import ReceiverCounters
from kvbaton.handoff.sender import SenderCounters
from kvbaton.model.runner import LayerListener
from kvbaton.rpc.serving import Registration, Server, new_event_loop, probe, serving
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import WorkerRuntime, load_runtime
from kvbaton.worker.status import Describe, WorkerServicer

logger = logging.getLogger(__name__)

OpenService = Callable[[WorkerRuntime, LoopThread], AbstractAsyncContextManager[Registration]]
"""Makes a service over a worker's parts; what it needs besides them lives as long as the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one kind of worker is."""

    role: pb.WorkerRole
    limits: Limits
    """What it starts with."""
    services: Sequence[OpenService]
    on_layer: LayerListener | None = None
    """Hears on the engine's thread of each layer that is computed."""
    sent: SenderCounters = field(default_factory=SenderCounters)
    received: ReceiverCounters = field(default_factory=ReceiverCounters)
    describe: Sequence[Describe] = ()
    """What the services add to the worker's status."""


async def serve_worker(
    config: WorkerConfig, offer: Offer, stop: asyncio.Event, started: "asyncio.Future[Server]"
) -> None:
    """Load, serve until `stop` is set, drain. `started` gets the server when it listens.

    Raises StartupError when the worker cannot start, and EngineFailedError when its engine fails.
    """
    await probe(config.host, config.port)
    runtime = await load_runtime(config, offer.limits, offer.on_layer)
    # KV outlives the token streams while they drain: some of them may still wait for theirs.
    async with LoopThread("kv", new_event_loop) as kv_thread, AsyncExitStack() as stack:
        stack.callback(runtime.admission.close)
        services = [await stack.enter_async_context(opened(runtime, kv_thread)) for opened in offer.services]
        with runtime.engine:
            status = WorkerServicer(offer.role, runtime, offer.sent, offer.received, stop, offer.describe)
            services.append(status.registration)
            async with serving(services, config.host, config.port, grace_seconds=config.grace_seconds) as server:
                logger.info("%s worker ready on %s, serving %s", _name(offer.role), server.address, runtime.model.name)
                started.set_result(server)
                await runtime.engine.serve_until(stop)


def _name(role: pb.WorkerRole) -> str:
    return pb.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()
