"""A router, from its options to its end."""

import asyncio
import itertools
import logging
from collections.abc import Sequence

from kvbaton.engine.errors import StartupError
from kvbaton.router.config import RouterConfig
from kvbaton.router.links import LinkKeeper
from kvbaton.router.registry import DECODE, PREFILL, UNIFIED, Registry, Worker
from kvbaton.router.servicer import AdminServicer, InferenceServicer
from kvbaton.rpc.serving import Server, channel, check_peer, probe, serving
from kvbaton.text.bundled import resolve_model
from kvbaton.text.tokenizer import load_tokenizer
from kvbaton.v1.worker_pb2 import WorkerRole

logger = logging.getLogger(__name__)


async def serve_router(config: RouterConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Serve until `stop` is set, drain. `started` gets the server when it listens.

    Health says SERVING while a request could be placed. Raises StartupError when the router cannot start, or
    when its workers turn out to contradict each other before it was ever ready.
    """
    _check(config)
    await probe(config.host, config.port)
    workers = [
        *_workers(config.prefill, PREFILL),
        *_workers(config.decode, DECODE),
        *_workers(config.workers, UNIFIED),
    ]
    readiness = asyncio.Event()
    tokenizer = load_tokenizer(resolve_model(config.model))
    digest = tokenizer.digest if tokenizer is not None else ""
    registry = Registry(workers, on_readiness=lambda _: readiness.set(), vocabulary_digest=digest)
    inference, admin = InferenceServicer(config, registry, tokenizer), AdminServicer(registry)
    services = [inference.registration, admin.registration]
    try:
        async with serving(services, config.host, config.port, grace_seconds=config.grace_seconds) as server:
            await server.set_serving(False)
            logger.info("router listening on %s, waiting for workers", server.address)
            started.set_result(server)
            async with asyncio.TaskGroup() as group:
                running = [
                    group.create_task(registry.watch_all()),
                    group.create_task(_announce(server, registry, readiness)),
                    group.create_task(LinkKeeper(registry).run()),
                ]
                await stop.wait()
                for task in running:
                    task.cancel()
    finally:
        for worker in workers:
            await worker.channel.close()


async def _announce(server: Server, registry: Registry, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        await server.set_serving(registry.ready)
        if registry.ready and registry.model is not None:
            logger.info("router ready on %s, serving %s", server.address, registry.model.name)
        else:
            logger.warning("router not ready: it needs workers for both legs")


def _check(config: RouterConfig) -> None:
    named = {"prefill": config.prefill, "decode": config.decode, "workers": config.workers}
    for option in ("prefill", "decode"):
        if not named[option] and not config.workers:
            raise StartupError(f"--{option}: name at least one worker, as host:port")
    for option, addresses in named.items():
        if len(set(addresses)) != len(addresses):
            raise StartupError(f"--{option}: a worker is named twice")
        for address in addresses:
            check_peer(option, address)
    for (one, first), (other, second) in itertools.combinations(named.items(), 2):
        both = sorted(set(first) & set(second))
        if both:
            raise StartupError(f"--{one} and --{other}: {', '.join(both)} cannot be both")


def _workers(addresses: Sequence[str], role: WorkerRole) -> list[Worker]:
    return [Worker(address, role, channel(address)) for address in addresses]
