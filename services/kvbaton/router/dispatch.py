"""One request's two legs.

The decode leg opens first and brings the ticket; the prefill leg then delivers the first token and the KV; the decode
leg's tokens follow, from the second on. Both run in one task group: when one fails, or the client goes, both end.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvbaton.engine.errors import NotFoundError, UnavailableError
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.admission import AdmittedRequest
from kvbaton.router.registry import Worker
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.rpc.sampling import sampling_to_proto
from kvbaton.rpc.serving import format_address, parse_address
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub

Emit = Callable[[types.TokenEvent], Awaitable[None]]
"""Passes tokens on to the client."""


@dataclass(slots=True)
class Dispatch:
    """A request on its way over a pair of workers."""

    request: AdmittedRequest
    prefill: Worker
    decode: Worker
    emit: Emit
    timings: types.Timings = field(default_factory=types.Timings)
    finish_reason: types.FinishReason = types.FINISH_REASON_UNSPECIFIED
    cached_tokens: int = 0
    num_emitted: int = 0
    _target: "asyncio.Future[prefill_pb2.TransferTarget]" = field(init=False)
    _first_emitted: asyncio.Event = field(default_factory=asyncio.Event)
    _prefill_load: ExitStack = field(default_factory=ExitStack)

    async def run(self, timeout: float | None) -> None:
        """Run both legs to the last token; `timeout` in seconds is what is left of the client's deadline.

        Raises an ExceptionGroup of the errors of the table, UnavailableError when a worker was lost.
        """
        self._target = asyncio.get_running_loop().create_future()
        deadline = None if timeout is None else time.monotonic() + timeout
        packed, sampling = pack_token_ids(self.request.prompt), sampling_to_proto(self.request.sampling)
        num_prompt = len(self.request.prompt)
        with self.decode.carrying(num_prompt), self._prefill_load:
            # From the choice on, so that the next choice sees it, and until the prefill leg has ended.
            self._prefill_load.enter_context(self.prefill.carrying(num_prompt))
            async with asyncio.TaskGroup() as group:
                decode_leg = group.create_task(self._decode_leg(packed, sampling, deadline))
                group.create_task(self._prefill_leg(packed, sampling, deadline, decode_leg))

    async def _decode_leg(self, packed: bytes, sampling: types.SamplingParams, deadline: float | None) -> None:
        request = decode_pb2.DecodeRequest(
            request_id=self.request.request_id, prompt_token_ids=packed, sampling=sampling
        )
        stub = DecodeServiceStub(self.decode.channel)
        peer = f"decode worker {self.decode.address}"
        finished: decode_pb2.DecodeFinished | None = None
        async with _leg(stub.Decode(request, timeout=_left(deadline)), peer) as responses:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "admitted":
                        self.timings.decode_admit_seconds = response.admitted.wait_seconds
                        self._target.set_result(self._transfer_target(response.admitted))
                    case "tokens":
                        # This leg's connection may be quicker than the one that carries the first token.
                        await self._first_emitted.wait()
                        await self._pass_on(response.tokens)
                    case "finished":
                        finished = response.finished
                        self.timings.decode_wait_seconds = finished.wait_seconds
                        self.timings.decode_seconds = finished.decode_seconds
        if finished is None:
            raise UnavailableError(f"{peer} ended the request early")

    async def _prefill_leg(
        self,
        packed: bytes,
        sampling: types.SamplingParams,
        deadline: float | None,
        decode_leg: "asyncio.Task[None]",
    ) -> None:
        request = prefill_pb2.PrefillRequest(
            request_id=self.request.request_id,
            prompt_token_ids=packed,
            sampling=sampling,
            target=await self._target,
        )
        stub = PrefillServiceStub(self.prefill.channel)
        peer = f"prefill worker {self.prefill.address}"
        finished: prefill_pb2.PrefillFinished | None = None
        async with _leg(stub.Prefill(request, timeout=_left(deadline)), peer) as responses:
            async for response in responses:
                if response.HasField("first_token"):
                    await self._pass_on(response.first_token)
                    self._first_emitted.set()
                    if response.first_token.finish_reason:
                        decode_leg.cancel()
                elif response.HasField("finished"):
                    finished = response.finished
                    self.timings.prefill_queue_seconds = finished.queue_seconds
                    self.timings.prefill_compute_seconds = finished.compute_seconds
                    if finished.HasField("transfer"):
                        self.timings.transfer.CopyFrom(finished.transfer)
                    self.cached_tokens = finished.cached_tokens
        self._prefill_load.close()
        if finished is None:
            raise UnavailableError(f"{peer} ended the request early")

    async def _pass_on(self, tokens: types.TokenEvent) -> None:
        if tokens.first_index != self.num_emitted:
            raise UnavailableError(f"token {tokens.first_index} came where {self.num_emitted} was next")
        self.num_emitted += len(tokens.token_ids)
        self.finish_reason = tokens.finish_reason
        await self.emit(tokens)

    def _transfer_target(self, admitted: decode_pb2.DecodeAdmitted) -> prefill_pb2.TransferTarget:
        endpoint = admitted.kv_endpoint
        if not endpoint:
            host, _ = parse_address(self.decode.address)
            endpoint = format_address(host, admitted.kv_port)
        return prefill_pb2.TransferTarget(
            endpoint=endpoint,
            ticket=admitted.ticket,
            attempt=1,
            num_cached_tokens=admitted.num_cached_tokens,
        )


@asynccontextmanager
async def _leg(call: Any, peer: str) -> AsyncIterator[Any]:
    """An RPC to a worker: its errors become the project's own, and it ends when the block does."""
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        cause = from_rpc_error(error, peer)
        if isinstance(cause, NotFoundError):
            # A ticket that is gone is the workers' affair; the client asked for nothing that does not exist.
            raise UnavailableError(f"{peer}: {cause}") from error
        raise cause from error
    finally:
        call.cancel()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
