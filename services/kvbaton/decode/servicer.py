"""DecodeService: reserves room, waits for KV, decodes.

A request here: submit to the engine -> admitted, a ticket is opened over its blocks -> `KvTransferService` fills them
and closes the ticket -> the engine decodes -> tokens stream. With prefill_locally there is no ticket, and the engine
computes the prompt itself. However the stream ends, the ticket is closed first, so that nothing can write to the
blocks, and then they are freed.
"""

import functools

import grpc

from kvbaton.engine.errors import PreemptedError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.request import Request, Route
from kvbaton.handoff.clock import wall_seconds
from kvbaton.handoff.receiver import Reservation, TicketBook
from kvbaton.rpc import telemetry
from kvbaton.rpc.serving import Registration
from kvbaton.text.output import OutputText
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from kvbaton.worker.engine_thread import RequestHandle
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.spans import record_phase, record_prefill, seconds_between
from kvbaton.worker.token_events import prompt_logprobs_messages, token_event

Context = grpc.aio.ServicerContext[pb.DecodeRequest, pb.DecodeResponse]


class DecodeServicer(DecodeServiceServicer):
    """The RPC shell around one runtime and one book of tickets."""

    def __init__(self, runtime: WorkerRuntime, book: TicketBook, kv_port: int, kv_endpoint: str) -> None:
        """`kv_port` and `kv_endpoint` are where prefill workers deliver, as `DecodeAdmitted` says."""
        self._runtime = runtime
        self._book = book
        self._kv_port = kv_port
        self._kv_endpoint = kv_endpoint

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration(
            "kvbaton.v1.DecodeService", lambda server: add_DecodeServiceServicer_to_server(self, server)
        )

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> None:  # type: ignore[override]
        """See the proto."""
        new = await self._runtime.admission.read(request, Route.LOCAL if request.prefill_locally else Route.RECEIVE)
        handle = RequestHandle(new.request_id)
        reservation: Reservation | None = None
        finished = False
        try:
            self._runtime.engine.submit(handle, new)
            admitted = await handle.admitted()
            if new.route is Route.RECEIVE:
                reservation = self._reserve(admitted)
            await context.write(pb.DecodeResponse(admitted=self._admitted(admitted, reservation)))
            await self._stream(handle, new, context)
            finished = True
            _record_spans(admitted)
            await context.write(pb.DecodeResponse(finished=_finished(admitted)))
        except PreemptedError as error:
            await context.write(pb.DecodeResponse(preempted=pb.DecodePreempted(reason=str(error))))
        finally:
            if reservation is not None:
                self._book.close(reservation)
            self._runtime.engine.remove(handle, finished=finished)

    def _reserve(self, request: Request) -> Reservation:
        tokens = range(request.num_cached, request.num_prefill)
        on_applied = functools.partial(self._runtime.engine.kv_received, request.request_id)
        vocab_size = self._runtime.model.vocab_size
        return self._book.open(request.blocks, tokens, vocab_size, on_applied, request.window_start)

    def _admitted(self, request: Request, reservation: Reservation | None) -> pb.DecodeAdmitted:
        passed = request.milestones
        return pb.DecodeAdmitted(
            ticket=reservation.ticket if reservation is not None else b"",
            num_cached_tokens=request.num_cached,
            kv_port=self._kv_port,
            kv_endpoint=self._kv_endpoint,
            host=self._runtime.host,
            wait_seconds=seconds_between(passed.arrived, passed.admitted),
        )

    async def _stream(self, handle: RequestHandle, new: NewRequest, context: Context) -> None:
        """Pass tokens on until the answer ends; what came while the router was slow goes in one event."""
        output = OutputText(self._runtime.tokenizer, new.prompt, new.output, new.sampling)
        ended = False
        while not ended:
            tokens = await handle.next_tokens()
            if tokens[0].index == len(new.output):
                for logprobs in prompt_logprobs_messages(handle.prompt_logprobs):
                    await context.write(pb.DecodeResponse(prompt_logprobs=logprobs))
                if new.route is Route.RECEIVE:
                    # The prefill worker has sent the first token, and its text.
                    ended = token_event([tokens.pop(0)], output).finish_reason != types.FINISH_REASON_UNSPECIFIED
            if tokens and not ended:
                event = token_event(tokens, output)
                ended = event.finish_reason != types.FINISH_REASON_UNSPECIFIED
                await context.write(pb.DecodeResponse(tokens=event))


def _finished(request: Request) -> pb.DecodeFinished:
    passed = request.milestones
    finished = pb.DecodeFinished(
        wait_seconds=seconds_between(passed.kv_ready, passed.decode_started),
        decode_seconds=seconds_between(passed.decode_started, _ended(request)),
        cached_tokens=min(request.num_cached, request.num_prompt),
    )
    if request.route is Route.LOCAL:
        finished.prefill_queue_seconds = seconds_between(passed.arrived, passed.prefill_started)
        finished.prefill_compute_seconds = seconds_between(passed.prefill_started, passed.prefill_ended)
    return finished


def _record_spans(request: Request) -> None:
    passed = request.milestones
    record_phase(telemetry.SPAN_DECODE_ADMIT, passed.arrived, passed.admitted)
    if request.route is Route.LOCAL:
        record_prefill(request)
    record_phase(telemetry.SPAN_DECODE_WAIT, passed.kv_ready, passed.decode_started)
    decoded = {telemetry.ATTR_COMPLETION_TOKENS: len(request.output) - request.num_resumed - 1}
    record_phase(telemetry.SPAN_DECODE_STREAM, passed.decode_started, _ended(request), decoded)


def _ended(request: Request) -> float:
    """When the last token came. The engine itself knows of no end where a stop string was found."""
    return request.milestones.finished or wall_seconds()
