"""PrefillService: computes prompts and hands their KV over.

A request here: submit to the engine and open the transfer at once -> what the prefix cache holds leaves, and the
engine's thread reports layers to the `OutgoingTransfer`, which the KV loop sends -> the first token goes to the router
-> Applied -> blocks are freed. When the stream ends in any other way, the transfer is stopped first, and only then are
the blocks freed that it reads from.
"""

import asyncio

import grpc

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.request import Request, Route
from kvbaton.engine.scheduler import Batch
from kvbaton.handoff.peers import PeerConnections
from kvbaton.handoff.receiver import TICKET_BYTES
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, Target, TransferReport
from kvbaton.rpc import telemetry
from kvbaton.rpc.serving import Registration, parse_address
from kvbaton.text.output import OutputText
from kvbaton.v1 import prefill_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1 import worker_pb2
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from kvbaton.worker.engine_thread import RequestHandle
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.spans import record_prefill, seconds_between
from kvbaton.worker.token_events import prompt_logprobs_messages, token_event


class OutgoingTransfers:
    """The transfers that the engine's thread reports layers to, by the engine's request id."""

    def __init__(self) -> None:
        self._transfers: dict[str, OutgoingTransfer] = {}

    def add(self, request_id: str, transfer: OutgoingTransfer) -> None:
        """Report the request's layers to `transfer` from now on."""
        self._transfers[request_id] = transfer

    def remove(self, request_id: str) -> None:
        """Report to nobody any more."""
        self._transfers.pop(request_id, None)

    def layer_done(self, batch: Batch, layer: int) -> None:
        """Engine's thread: a layer's KV of `batch` is in the store."""
        # A unified worker computes many layers for nobody else: its decodes, and prompts that stay.
        if not self._transfers:
            return
        for piece in batch.slices[batch.num_decode_tokens :]:
            transfer = self._transfers.get(piece.request.request_id)
            if transfer is not None:
                transfer.layer_ready(layer, piece.start + piece.num_tokens, piece.request.blocks)


class PrefillServicer(PrefillServiceServicer):
    """The RPC shell around one runtime and one sender."""

    def __init__(
        self,
        runtime: WorkerRuntime,
        transfers: OutgoingTransfers,
        sender: KvSender,
        peers: PeerConnections,
        kv_thread: LoopThread,
    ) -> None:
        """`sender` and `peers` are used on `kv_thread` only."""
        self._runtime = runtime
        self._transfers = transfers
        self._sender = sender
        self._peers = peers
        self._kv_thread = kv_thread

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration(
            "kvbaton.v1.PrefillService", lambda server: add_PrefillServiceServicer_to_server(self, server)
        )

    async def Prefill(  # type: ignore[override]
        self,
        request: pb.PrefillRequest,
        context: "grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillResponse]",
    ) -> None:
        """See the proto."""
        new = await self._runtime.admission.read(request, Route.HAND_OFF)
        target = _target(request.target, len(new.prompt) + len(new.output))
        transfer = OutgoingTransfer(self._sender.geometry, target.tokens)
        handle = RequestHandle(new.request_id, transfer.first_token)
        self._transfers.add(handle.request_id, transfer)
        finished = False
        try:
            self._runtime.engine.submit(handle, new)
            # A write that a failing transfer cancels must not be the one that carries the headers: gRPC could then
            # send no status any more, and the router would wait for ever.
            await context.send_initial_metadata(())
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._send(target, transfer, context.time_remaining()))
                admitted = await handle.admitted()
                transfer.cached(admitted.num_cached, admitted.blocks)
                tokens = await handle.next_tokens()
                first = token_event(tokens, OutputText(self._runtime.tokenizer, new.prompt, new.output, new.sampling))
                if first.finish_reason:
                    # Before the router hears of it: it ends the decode leg, which then refuses the transfer.
                    sending.cancel()
                for logprobs in prompt_logprobs_messages(handle.prompt_logprobs):
                    await context.write(pb.PrefillResponse(prompt_logprobs=logprobs))
                await context.write(pb.PrefillResponse(first_token=first))
            report = None if first.finish_reason else sending.result()
            finished = True
            _record_spans(admitted, report)
            await context.write(pb.PrefillResponse(finished=_finished(admitted, report)))
        finally:
            self._transfers.remove(handle.request_id)
            self._runtime.engine.remove(handle, finished=finished)

    async def ConnectPeer(
        self,
        request: pb.ConnectPeerRequest,
        context: "grpc.aio.ServicerContext[pb.ConnectPeerRequest, pb.ConnectPeerResponse]",
    ) -> pb.ConnectPeerResponse:
        """See the proto."""
        _check_endpoint(request.endpoint, "endpoint")

        await self._kv_thread.call(self._peers.get(request.endpoint))
        link = worker_pb2.PeerLink(endpoint=request.endpoint, transport="grpc", reason="there is no other")
        return pb.ConnectPeerResponse(link=link)

    async def _send(self, target: Target, transfer: OutgoingTransfer, timeout: float | None) -> TransferReport:
        async def send() -> TransferReport:
            connection = await self._peers.get(target.endpoint)
            return await self._sender.send(connection, target, transfer, timeout)

        return await self._kv_thread.call(send())


def _target(target: pb.TransferTarget, num_tokens: int) -> Target:
    if len(target.ticket) != TICKET_BYTES:
        raise InvalidArgumentError("target.ticket", f"{len(target.ticket)} bytes are not {TICKET_BYTES}")
    if target.num_cached_tokens >= num_tokens:
        problem = f"{target.num_cached_tokens} of {num_tokens} tokens leave nothing to send"
        raise InvalidArgumentError("target.num_cached_tokens", problem)
    if target.attempt < 1:
        raise InvalidArgumentError("target.attempt", f"{target.attempt} is not 1 or more")
    _check_endpoint(target.endpoint, "target.endpoint")
    return Target(
        endpoint=target.endpoint,
        ticket=target.ticket,
        attempt=target.attempt,
        tokens=range(target.num_cached_tokens, num_tokens),
    )


def _check_endpoint(endpoint: str, field: str) -> None:
    try:
        parse_address(endpoint)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(field, str(error)) from error


def _finished(request: Request, report: TransferReport | None) -> pb.PrefillFinished:
    passed = request.milestones
    finished = pb.PrefillFinished(
        queue_seconds=seconds_between(passed.arrived, passed.prefill_started),
        compute_seconds=seconds_between(passed.prefill_started, passed.prefill_ended),
        cached_tokens=min(request.num_cached, request.num_prompt),
    )
    if report is not None:
        finished.transfer.CopyFrom(
            types.TransferStats(
                transport="grpc",
                payload_bytes=report.payload_bytes,
                frames=report.frames,
                seconds=report.seconds,
                overlapped_share=report.overlapped_share,
            )
        )
    return finished


def _record_spans(request: Request, report: TransferReport | None) -> None:
    record_prefill(request)
    if report is not None:
        telemetry.record_span(
            telemetry.SPAN_KV_TRANSFER,
            report.first_frame_ns,
            report.applied_ns,
            {
                telemetry.ATTR_TRANSFER_BYTES: report.payload_bytes,
                telemetry.ATTR_TRANSFER_FRAMES: report.frames,
                telemetry.ATTR_TRANSFER_TRANSPORT: "grpc",
                telemetry.ATTR_TRANSFER_OVERLAPPED_SHARE: report.overlapped_share,
            },
        )
