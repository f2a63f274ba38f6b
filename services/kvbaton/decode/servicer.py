"""DecodeService: reserves room, waits for KV, decodes.

A request here: submit to the engine -> admitted, a ticket is opened over its blocks -> `KvTransferService` fills them
and closes the ticket -> the engine decodes -> tokens stream. However the stream ends, the ticket is closed first, so
that nothing can write to the blocks, and then they are freed.
"""

import functools
import itertools

import grpc

from kvbaton.engine.errors import PreemptedError
from kvbaton.engine.request import Request, Route
from kvbaton.engine.scheduler import NewRequest
from kvbaton.engine.tokens import check_token_ids, unpack_token_ids
from kvbaton.handoff.receiver import Reservation, TicketBook
from kvbaton.rpc import telemetry
from kvbaton.rpc.sampling import FINISH_REASONS, complete_sampling_from_proto
from kvbaton.rpc.serving import Registration
from kvbaton.text.detokenizer import IncrementalDetokenizer
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from kvbaton.worker.engine_thread import RequestHandle
from kvbaton.worker.runtime import WorkerRuntime
from kvbaton.worker.spans import record_phase, seconds_between

Context = grpc.aio.ServicerContext[pb.DecodeRequest, pb.DecodeResponse]


class DecodeServicer(DecodeServiceServicer):
    """The RPC shell around one runtime and one book of tickets."""

    def __init__(self, runtime: WorkerRuntime, book: TicketBook, kv_port: int, kv_endpoint: str) -> None:
        """`kv_port` and `kv_endpoint` are where prefill workers deliver, as `DecodeAdmitted` says."""
        self._runtime = runtime
        self._book = book
        self._kv_port = kv_port
        self._kv_endpoint = kv_endpoint
        # Request ids are the clients' and may repeat; the engine's may not.
        self._serial = itertools.count()

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration(
            "kvbaton.v1.DecodeService", lambda server: add_DecodeServiceServicer_to_server(self, server)
        )

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> None:  # type: ignore[override]
        """See the proto."""
        prompt = unpack_token_ids(request.prompt_token_ids, "prompt_token_ids")
        check_token_ids(prompt, self._runtime.model.vocab_size, "prompt_token_ids")
        sampling = complete_sampling_from_proto(request.sampling)
        handle = RequestHandle(f"{request.request_id}/{next(self._serial)}")
        reservation: Reservation | None = None
        finished = False
        try:
            new = NewRequest(request_id=handle.request_id, prompt=prompt, sampling=sampling, route=Route.RECEIVE)
            self._runtime.engine.submit(handle, new)
            admitted = await handle.admitted()
            on_applied = functools.partial(self._runtime.engine.kv_received, handle.request_id)
            missing = range(admitted.num_cached, admitted.num_prefill)
            reservation = self._book.open(admitted.blocks, missing, self._runtime.model.vocab_size, on_applied)
            await context.write(pb.DecodeResponse(admitted=self._admitted(admitted, reservation)))
            await self._stream(handle, admitted, context)
            finished = True
            _record_spans(admitted)
            await context.write(pb.DecodeResponse(finished=_finished(admitted)))
        except PreemptedError as error:
            await context.write(pb.DecodeResponse(preempted=pb.DecodePreempted(reason=str(error))))
        finally:
            if reservation is not None:
                self._book.close(reservation)
            self._runtime.engine.remove(handle, finished=finished)

    def _admitted(self, request: Request, reservation: Reservation) -> pb.DecodeAdmitted:
        passed = request.milestones
        return pb.DecodeAdmitted(
            ticket=reservation.ticket,
            num_cached_tokens=reservation.tokens.start,
            kv_port=self._kv_port,
            kv_endpoint=self._kv_endpoint,
            host=self._runtime.host,
            wait_seconds=seconds_between(passed.arrived, passed.admitted),
        )

    async def _stream(self, handle: RequestHandle, request: Request, context: Context) -> None:
        """Pass tokens on from the second; what came while the router was slow goes in one event."""
        detokenizer = IncrementalDetokenizer(self._runtime.tokenizer, request.prompt)
        reason = None
        while reason is None:
            tokens = await handle.next_tokens()
            reason = tokens[-1].finish_reason
            if tokens[0].index == request.num_resumed:
                # The prefill worker has sent the first token, and its text.
                detokenizer.push([tokens.pop(0).token_id])
            if not tokens:
                continue
            token_ids = [token.token_id for token in tokens]
            text = detokenizer.push(token_ids)
            if reason is not None:
                text += detokenizer.flush()
            event = types.TokenEvent(
                first_index=tokens[0].index,
                token_ids=token_ids,
                text=text,
                finish_reason=FINISH_REASONS[reason],
            )
            await context.write(pb.DecodeResponse(tokens=event))


def _finished(request: Request) -> pb.DecodeFinished:
    passed = request.milestones
    return pb.DecodeFinished(
        wait_seconds=seconds_between(passed.kv_ready, passed.decode_started),
        decode_seconds=seconds_between(passed.decode_started, passed.finished),
        cached_tokens=request.num_cached,
    )


def _record_spans(request: Request) -> None:
    passed = request.milestones
    record_phase(telemetry.SPAN_DECODE_ADMIT, passed.arrived, passed.admitted)
    record_phase(telemetry.SPAN_DECODE_WAIT, passed.kv_ready, passed.decode_started)
    decoded = {telemetry.ATTR_COMPLETION_TOKENS: len(request.output) - 1}
    record_phase(telemetry.SPAN_DECODE_STREAM, passed.decode_started, passed.finished, decoded)
