"""WorkerService: what a worker tells about itself."""

import asyncio
import contextlib

import grpc

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.handoff.receiver import ReceiverCounters
from kvbaton.handoff.sender import SenderCounters
from kvbaton.rpc.serving import Registration
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from kvbaton.worker.runtime import WorkerRuntime

DEFAULT_INTERVAL_SECONDS = 0.5


class WorkerServicer(WorkerServiceServicer):
    """Streams the state of one runtime."""

    def __init__(
        self,
        role: pb.WorkerRole,
        runtime: WorkerRuntime,
        sent: SenderCounters,
        received: ReceiverCounters,
        stop: asyncio.Event,
    ) -> None:
        """`sent` and `received` count this worker's transfers; `stop` is set when it drains."""
        self._role = role
        self._runtime = runtime
        self._sent = sent
        self._received = received
        self._stop = stop

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration(
            "kvbaton.v1.WorkerService", lambda server: add_WorkerServiceServicer_to_server(self, server)
        )

    async def GetStatus(
        self,
        request: pb.GetStatusRequest,
        context: "grpc.aio.ServicerContext[pb.GetStatusRequest, pb.WorkerStatus]",
    ) -> pb.WorkerStatus:
        """See the proto."""
        return await self._status(check=True)

    async def WatchStatus(  # type: ignore[override]
        self,
        request: pb.WatchStatusRequest,
        context: "grpc.aio.ServicerContext[pb.WatchStatusRequest, pb.WorkerStatus]",
    ) -> None:
        """See the proto."""
        interval = request.min_interval_seconds or DEFAULT_INTERVAL_SECONDS
        if not 0.05 <= interval <= 60:
            raise InvalidArgumentError("min_interval_seconds", f"{interval} is not between 0.05 and 60")
        last: pb.WorkerStatus | None = None
        # A stream that never ended would make every drain last as long as its grace.
        while last is None or not last.draining:
            status = await self._status(check=False)
            if status != last:
                await context.write(status)
                last = status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._stop.wait()

    async def _status(self, check: bool) -> pb.WorkerStatus:
        runtime, sent, received = self._runtime, self._sent, self._received
        snapshot = await runtime.engine.snapshot(check=check)
        counts, counters = snapshot.counts, snapshot.counters
        return pb.WorkerStatus(
            role=self._role,
            incarnation=runtime.incarnation,
            model=runtime.model,
            draining=self._stop.is_set(),
            pool=pb.PoolStatus(
                block_size=runtime.store.block_size,
                num_blocks=runtime.num_blocks,
                num_free_blocks=snapshot.num_free_blocks,
            ),
            queues=pb.QueueStatus(
                num_waiting=counts.waiting,
                num_prefilling=counts.prefilling,
                num_handing_off=counts.handing_off,
                num_receiving=counts.receiving,
                num_decoding=counts.decoding,
            ),
            counters=pb.WorkerCounters(
                num_steps=counters.num_steps,
                prefill_tokens_computed=counters.prefill_tokens_computed,
                decode_tokens_computed=counters.decode_tokens_computed,
                kv_bytes_sent=sent.kv_bytes_sent,
                kv_bytes_received=received.kv_bytes_received,
                transfers_applied=sent.transfers_applied + received.transfers_applied,
                transfers_rejected=sent.transfers_rejected + received.transfers_rejected,
                requests_finished=snapshot.requests_finished,
                requests_cancelled=snapshot.requests_cancelled,
            ),
        )
