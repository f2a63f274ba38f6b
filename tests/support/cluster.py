"""The three services in one event loop, for tests that look inside or hold something up."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvbaton.cli.health import wait_until_serving
from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.service import serve_decode
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.service import serve_prefill
from kvbaton.router.config import RouterConfig
from kvbaton.router.service import serve_router
from kvbaton.rpc.serving import Server
from kvbaton.unified.config import UnifiedConfig
from kvbaton.unified.service import serve_unified
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub

START_SECONDS = 60.0
SETTLE_SECONDS = 1.0
"""How soon everything must be free after a request has ended."""


async def worker_status(address: str) -> pb.WorkerStatus:
    """Ask a worker for its state."""
    async with grpc.aio.insecure_channel(address) as channel:
        return await WorkerServiceStub(channel).GetStatus(pb.GetStatusRequest())


async def wait_for_status(
    address: str, condition: Callable[[pb.WorkerStatus], bool], seconds: float = 20.0
) -> pb.WorkerStatus:
    """Ask again until `condition` holds; fails with the last state when it does not within `seconds`."""
    status = pb.WorkerStatus()
    try:
        async with asyncio.timeout(seconds):
            while True:
                status = await worker_status(address)
                if condition(status):
                    return status
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{address} did not come to the expected state:\n{status}") from None


def is_idle(status: pb.WorkerStatus) -> bool:
    """Whether nothing runs, waits or is held."""
    queues = status.queues
    busy = queues.num_waiting + queues.num_prefilling + queues.num_handing_off
    busy += queues.num_receiving + queues.num_decoding
    return busy == 0 and status.pool.num_free_blocks == status.pool.num_blocks


async def assert_idle(*addresses: str, seconds: float = SETTLE_SECONDS) -> None:
    """No worker holds a block `seconds` from now at the latest."""
    for address in addresses:
        await wait_for_status(address, is_idle, seconds)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Addresses of running services."""

    router: str
    prefill: str
    decode: str
    unified: str = ""

    async def assert_idle(self) -> None:
        """No worker holds a block, a second from now at the latest."""
        await assert_idle(*(address for address in (self.prefill, self.decode, self.unified) if address))


@asynccontextmanager
async def serving_in_loop(serve: Callable[..., Coroutine[Any, Any, None]], config: Any) -> AsyncIterator[Server]:
    """Run one service in this loop for the length of the block. Raises what its start raises."""
    stop = asyncio.Event()
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(config, stop, started))
        async with asyncio.timeout(START_SECONDS):
            server = await started
        try:
            yield server
        finally:
            stop.set()


@asynccontextmanager
async def cluster(
    folder: Path,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
) -> AsyncIterator[Cluster]:
    """One prefill worker, one decode worker and a router on the model in `folder`; dictionaries override options."""
    async with mixed_cluster(folder, prefill=prefill or {}, decode=decode or {}, router=router) as services:
        yield services


@asynccontextmanager
async def mixed_cluster(
    folder: Path,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    unified: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
) -> AsyncIterator[Cluster]:
    """A router, and a worker of each role that is given, if only an empty dictionary of options."""
    worker = {"model": str(folder), "port": 0, "block_size": 8, "kv_memory": "4MiB", "grace_seconds": 0.5}
    roles: tuple[tuple[str, Any, Any, dict[str, Any] | None], ...] = (
        ("prefill", serve_prefill, PrefillConfig, prefill),
        ("decode", serve_decode, DecodeConfig, decode),
        ("unified", serve_unified, UnifiedConfig, unified),
    )
    async with AsyncExitStack() as stack:
        addresses = dict.fromkeys(("prefill", "decode", "unified"), "")
        for name, serve, config, options in roles:
            if options is not None:
                serving = serving_in_loop(serve, config(**{**worker, **options}))
                addresses[name] = (await stack.enter_async_context(serving)).address
        router_config = RouterConfig(
            model=str(folder),
            prefill=tuple(filter(None, [addresses["prefill"]])),
            decode=tuple(filter(None, [addresses["decode"]])),
            workers=tuple(filter(None, [addresses["unified"]])),
            **{"port": 0, "grace_seconds": 0.5, **(router or {})},
        )
        server = await stack.enter_async_context(serving_in_loop(serve_router, router_config))
        async with asyncio.timeout(START_SECONDS):
            await wait_until_serving(server.address)
        yield Cluster(server.address, **addresses)
