"""A worker's status: at once, then when it has changed; and the sums that a runtime is made with."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.engine.request import Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.receiver import ReceiverCounters
from kvbaton.rpc.serving import channel, serving
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub
from kvbaton.worker.engine_thread import RequestHandle
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.status import WorkerServicer
from support.fakes import PATIENCE, FakeRunner, FakeStore, make_runtime, model_info
from support.requests import new_request

LIMITS = Limits(max_prefill_tokens=8, max_decode_seqs=4, max_waiting=4)


class Worker:
    def __init__(self, runtime: WorkerRuntime, stub: Any) -> None:
        self.runtime, self.stub = runtime, stub
        self.stop = asyncio.Event()
        self.counters = ReceiverCounters(kv_bytes_received=7)


@asynccontextmanager
async def working() -> AsyncIterator[Worker]:
    runtime = make_runtime(FakeStore(), FakeRunner(), LIMITS)
    worker = Worker(runtime, None)
    servicer = WorkerServicer(pb.WORKER_ROLE_DECODE, runtime, worker.counters, worker.stop)
    async with asyncio.timeout(PATIENCE):
        with runtime.engine:
            async with (
                serving([servicer.registration], "127.0.0.1", 0, grace_seconds=0) as server,
                channel(server.address) as opened,
            ):
                worker.stub = WorkerServiceStub(opened)
                yield worker


async def test_a_status_tells_who_the_worker_is_and_what_it_holds() -> None:
    async with working() as worker:
        handle = RequestHandle("a")
        new = new_request(handle.request_id, [5] * 6, SamplingParams(max_tokens=3, seed=0), Route.RECEIVE)
        worker.runtime.engine.submit(handle, new)
        await handle.admitted()
        status = await worker.stub.GetStatus(pb.GetStatusRequest())
        assert status == pb.WorkerStatus(
            role=pb.WORKER_ROLE_DECODE,
            incarnation="1",
            model=model_info(),
            draining=False,
            pool=pb.PoolStatus(block_size=4, num_blocks=32, num_free_blocks=30),
            queues=pb.QueueStatus(num_receiving=1),
            counters=pb.WorkerCounters(kv_bytes_received=7),
        )


async def test_a_watch_tells_at_once_and_then_of_changes() -> None:
    async with working() as worker:
        watch = worker.stub.WatchStatus(pb.WatchStatusRequest(min_interval_seconds=0.05))
        assert (await watch.read()).counters.transfers_applied == 0
        worker.counters.transfers_applied = 3
        assert (await watch.read()).counters.transfers_applied == 3
        watch.cancel()


async def test_a_watch_tells_of_the_drain_at_once_and_ends() -> None:
    async with working() as worker:
        # A minute, far beyond the test's patience.
        watch = worker.stub.WatchStatus(pb.WatchStatusRequest(min_interval_seconds=60))
        assert not (await watch.read()).draining
        worker.stop.set()
        assert (await watch.read()).draining
        assert await watch.read() is grpc.aio.EOF


@pytest.mark.parametrize("interval", [0.04, 61, -1, float("nan"), float("inf")])
async def test_an_interval_out_of_range_is_refused(interval: float) -> None:
    async with working() as worker:
        with pytest.raises(grpc.aio.AioRpcError, match="min_interval_seconds") as caught:
            await worker.stub.WatchStatus(pb.WatchStatusRequest(min_interval_seconds=interval)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
