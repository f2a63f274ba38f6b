"""WorkerService: what a worker tells about itself, and what it can be told while it runs."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.scheduler import Limits
from kvbaton.handoff.receiver import ReceiverCounters
from kvbaton.handoff.sender import SenderCounters
from kvbaton.rpc.serving import Registration
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from kvbaton.worker.config import MAX_TARGET_ITL_MS
from kvbaton.worker.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

DEFAULT_INTERVAL_SECONDS = 0.5

Describe = Callable[[pb.WorkerStatus], None]
"""Fills in what one of a worker's services tells in its status."""


class WorkerServicer(WorkerServiceServicer):
    """Tells the state of one runtime, and changes its limits."""

    def __init__(
        self,
        role: pb.WorkerRole,
        runtime: WorkerRuntime,
        sent: SenderCounters,
        received: ReceiverCounters,
        stop: asyncio.Event,
        describe: Sequence[Describe] = (),
    ) -> None:
        """`sent` and `received` count this worker's transfers; `stop` is set when it drains."""
        self._role = role
        self._runtime = runtime
        self._limits = runtime.limits
        self._sent = sent
        self._received = received
        self._stop = stop
        self._describe = describe

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

    async def SetLimits(
        self,
        request: pb.SetLimitsRequest,
        context: "grpc.aio.ServicerContext[pb.SetLimitsRequest, pb.SetLimitsResponse]",
    ) -> pb.SetLimitsResponse:
        """See the proto."""
        limits = self._changed_limits(request)
        self._runtime.engine.set_limits(limits)
        self._limits = limits
        logger.info("limits from now on: %s", limits)
        return pb.SetLimitsResponse(limits=_limits_to_proto(limits))

    def _changed_limits(self, request: pb.SetLimitsRequest) -> Limits:
        limits = self._limits
        if request.HasField("max_prefill_tokens"):
            limits = replace(limits, max_prefill_tokens=request.max_prefill_tokens)
        if request.HasField("max_decode_seqs"):
            limits = replace(limits, max_decode_seqs=request.max_decode_seqs)
        if request.HasField("target_itl_ms"):
            if not 0 <= request.target_itl_ms <= MAX_TARGET_ITL_MS:
                problem = f"{request.target_itl_ms} is not between 0 and {MAX_TARGET_ITL_MS}"
                raise InvalidArgumentError("target_itl_ms", problem)
            limits = replace(limits, target_itl=request.target_itl_ms / 1e3 or None)
        if limits.max_prefill_tokens and self._role == pb.WORKER_ROLE_DECODE:
            raise InvalidArgumentError("max_prefill_tokens", "a decode worker computes no prompts")
        if limits.max_decode_seqs and self._role == pb.WORKER_ROLE_PREFILL:
            raise InvalidArgumentError("max_decode_seqs", "a prefill worker does not decode")
        if limits.target_itl and self._role != pb.WORKER_ROLE_UNIFIED:
            raise InvalidArgumentError("target_itl_ms", "this worker has no prompts beside its decodes")
        if not limits.max_prefill_tokens and not limits.max_decode_seqs:
            field = "max_decode_seqs" if self._role == pb.WORKER_ROLE_DECODE else "max_prefill_tokens"
            raise InvalidArgumentError(field, "0 leaves the worker nothing to do")
        return limits

    async def _status(self, check: bool) -> pb.WorkerStatus:
        runtime, sent, received = self._runtime, self._sent, self._received
        snapshot = await runtime.engine.snapshot(check=check)
        counts, counters = snapshot.counts, snapshot.counters
        status = pb.WorkerStatus(
            role=self._role,
            incarnation=runtime.incarnation,
            model=runtime.model,
            draining=self._stop.is_set(),
            pool=pb.PoolStatus(
                block_size=runtime.store.block_size,
                num_blocks=runtime.num_blocks,
                num_free_blocks=snapshot.num_free_blocks,
                num_cached_blocks=snapshot.num_cached_blocks,
            ),
            limits=_limits_to_proto(snapshot.limits),
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
                prefix_tokens_queried=counters.prefix_tokens_queried,
                prefix_tokens_hit=counters.prefix_tokens_hit,
                requests_preempted=counters.requests_preempted,
                requests_not_a_number=counters.requests_not_a_number,
            ),
        )
        for describe in self._describe:
            describe(status)
        return status


def _limits_to_proto(limits: Limits) -> pb.EngineLimits:
    return pb.EngineLimits(
        max_prefill_tokens=limits.max_prefill_tokens,
        max_decode_seqs=limits.max_decode_seqs,
        target_itl_ms=(limits.target_itl or 0.0) * 1e3,
    )
