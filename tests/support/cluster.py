"""The three services in one event loop, for tests that look inside or hold something up."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
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

    async def assert_idle(self) -> None:
        """Neither worker holds a block, a second from now at the latest."""
        await assert_idle(self.prefill, self.decode)


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
    worker = {"model": str(folder), "port": 0, "block_size": 8, "kv_memory": "4MiB", "grace_seconds": 0.5}
    prefill_config = PrefillConfig(**{**worker, **(prefill or {})})
    decode_config = DecodeConfig(**{**worker, **(decode or {})})
    async with (
        serving_in_loop(serve_prefill, prefill_config) as first,
        serving_in_loop(serve_decode, decode_config) as second,
    ):
        router_config = RouterConfig(
            model=str(folder),
            prefill=(first.address,),
            decode=(second.address,),
            **{"port": 0, "grace_seconds": 0.5, **(router or {})},
        )
        async with serving_in_loop(serve_router, router_config) as third:
            async with asyncio.timeout(START_SECONDS):
                await wait_until_serving(third.address)
            yield Cluster(third.address, first.address, second.address)
