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
from kvbaton.handoff.sender import SenderCounters
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
async def working(role: pb.WorkerRole = pb.WORKER_ROLE_UNIFIED, limits: Limits = LIMITS) -> AsyncIterator[Worker]:
    runtime = make_runtime(FakeStore(), FakeRunner(), limits)
    worker = Worker(runtime, None)

    def describe(status: pb.WorkerStatus) -> None:
        status.kv_port = 7201

    servicer = WorkerServicer(role, runtime, SenderCounters(kv_bytes_sent=5), worker.counters, worker.stop, [describe])
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
            role=pb.WORKER_ROLE_UNIFIED,
            incarnation="1",
            model=model_info(),
            draining=False,
            pool=pb.PoolStatus(block_size=4, num_blocks=32, num_free_blocks=30),
            queues=pb.QueueStatus(num_receiving=1),
            counters=pb.WorkerCounters(kv_bytes_sent=5, kv_bytes_received=7, prefix_tokens_queried=6),
            limits=pb.EngineLimits(max_prefill_tokens=8, max_decode_seqs=4),
            kv_port=7201,
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


async def test_limits_are_changed_one_by_one_and_told() -> None:
    async with working() as worker:
        watch = worker.stub.WatchStatus(pb.WatchStatusRequest(min_interval_seconds=0.05))
        await watch.read()
        answer = await worker.stub.SetLimits(pb.SetLimitsRequest(max_prefill_tokens=0))
        assert answer.limits == pb.EngineLimits(max_prefill_tokens=0, max_decode_seqs=4)
        assert (await watch.read()).limits == answer.limits
        watch.cancel()
        await worker.stub.SetLimits(pb.SetLimitsRequest(max_prefill_tokens=16, target_itl_ms=50))
        answer = await worker.stub.SetLimits(pb.SetLimitsRequest(max_decode_seqs=0))
        assert answer.limits == pb.EngineLimits(max_prefill_tokens=16, max_decode_seqs=0, target_itl_ms=50)
        in_force = (await worker.runtime.engine.snapshot()).limits
        assert in_force == Limits(max_prefill_tokens=16, max_decode_seqs=0, max_waiting=4, target_itl=0.05)
        answer = await worker.stub.SetLimits(pb.SetLimitsRequest(target_itl_ms=0))
        assert answer.limits.target_itl_ms == 0


PREFILL = pb.WORKER_ROLE_PREFILL, Limits(max_prefill_tokens=8, max_decode_seqs=0, max_waiting=4)
DECODE = pb.WORKER_ROLE_DECODE, Limits(max_prefill_tokens=0, max_decode_seqs=4, max_waiting=4)
UNIFIED = pb.WORKER_ROLE_UNIFIED, LIMITS


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        (PREFILL, {"max_decode_seqs": 1}, "max_decode_seqs: a prefill worker does not decode"),
        (PREFILL, {"target_itl_ms": 9}, "target_itl_ms: this worker has no prompts beside its decodes"),
        (PREFILL, {"max_prefill_tokens": 0}, "max_prefill_tokens: 0 leaves the worker nothing to do"),
        (DECODE, {"max_prefill_tokens": 1}, "max_prefill_tokens: a decode worker computes no prompts"),
        (DECODE, {"max_decode_seqs": 0}, "max_decode_seqs: 0 leaves the worker nothing to do"),
        (UNIFIED, {"max_prefill_tokens": 0, "max_decode_seqs": 0}, "0 leaves the worker nothing to do"),
        (UNIFIED, {"target_itl_ms": -1}, "target_itl_ms: -1.0 is not between 0 and 60000"),
        (UNIFIED, {"target_itl_ms": 60001}, "target_itl_ms"),
        (UNIFIED, {"target_itl_ms": float("nan")}, "target_itl_ms"),
    ],
)
async def test_limits_that_cannot_be_are_refused_and_change_nothing(
    kind: tuple[pb.WorkerRole, Limits], change: dict[str, Any], problem: str
) -> None:
    async with working(*kind) as worker:
        with pytest.raises(grpc.aio.AioRpcError, match=problem) as caught:
            await worker.stub.SetLimits(pb.SetLimitsRequest(**change))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await worker.runtime.engine.snapshot()).limits == kind[1]
