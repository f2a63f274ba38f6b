"""One attempt at an answer, over a pair of workers or on one that serves both legs.

The decode leg opens first and brings the ticket; the prefill leg then delivers the next token and the KV; the decode
leg's tokens follow. Both run in one task group: when one fails, or the client goes, both end.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from kvbaton.engine.errors import KvbatonError, NotFoundError, UnavailableError
from kvbaton.router.links import kv_endpoint
from kvbaton.router.registry import Placement, Worker
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What both legs are asked for, in the workers' terms."""

    request_id: str
    prompt_token_ids: bytes
    output_token_ids: bytes
    """The answer so far."""
    sampling: types.SamplingParams
    priority: int
    cache_salt: str
    num_uncached: int
    """Tokens that will have to be computed, as far as this router knows."""
    deadline: float | None
    """Of `time.monotonic`, in seconds."""

    @property
    def timeout(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that both legs' requests have in common, `sampling` left out."""
        return {
            "request_id": self.request_id,
            "prompt_token_ids": self.prompt_token_ids,
            "output_token_ids": self.output_token_ids,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }


class Listener(Protocol):
    """Who hears what comes of an attempt."""

    async def on_tokens(self, tokens: types.TokenEvent) -> None:
        """The next tokens. Raises UnavailableError when they are not the next."""
        ...

    async def on_prompt_logprobs(self, logprobs: types.PromptLogprobs) -> None:
        """Logprobs of the next tokens of the prompt."""
        ...

    def on_prefix_ready(self) -> None:
        """The prompt's KV is where the answer is decoded, and in both workers' caches; may be told more than once."""
        ...


@dataclass(slots=True)
class Attempt:
    """A job on its way. What it brought is here when `run` has returned."""

    job: Job
    placement: Placement
    listener: Listener
    timings: types.Timings = field(default_factory=types.Timings)
    """Where the workers' time went."""
    cached_tokens: int = 0
    """Leading tokens whose KV was found by the worker that computed the rest."""
    preempted: bool = False
    """Whether the decode worker handed the request back."""
    _target: "asyncio.Future[prefill_pb2.TransferTarget]" = field(init=False)
    _first_passed_on: asyncio.Event = field(default_factory=asyncio.Event)
    _prefill_load: ExitStack = field(default_factory=ExitStack)

    async def run(self) -> None:
        """Go on to the last token, or until the decode worker hands the request back.

        Raises the errors of the table, on two legs within an ExceptionGroup: UnavailableError when a worker was lost.
        """
        self._target = asyncio.get_running_loop().create_future()
        prefill, decode = self.placement.prefill, self.placement.decode
        with decode.carrying(), self._prefill_load:
            # From the choice on, so that the next choice sees it, and until the prompt is computed.
            if prefill is not None:
                self._prefill_load.enter_context(prefill.carrying())
            self._prefill_load.enter_context((prefill or decode).prefilling(self.job.num_uncached))
            if prefill is None:
                self._first_passed_on.set()
                await self._decode_leg(locally=True)
            else:
                async with asyncio.TaskGroup() as group:
                    decode_leg = group.create_task(self._decode_leg(locally=False))
                    group.create_task(self._prefill_leg(prefill, decode_leg.cancel))

    async def _decode_leg(self, *, locally: bool) -> None:
        decode = self.placement.decode
        request = decode_pb2.DecodeRequest(**self.job.fields, sampling=self.job.sampling, prefill_locally=locally)
        if not locally:
            # The prompt is not computed there, and with this set what the worker has cached of it would go unused.
            request.sampling.ClearField("prompt_logprobs")
        call = DecodeServiceStub(decode.channel).Decode(request, timeout=self.job.timeout)
        peer = f"decode worker {decode.address}"
        ended = False
        async with _leg(call, peer) as responses:
            async for response in responses:
                event = response.WhichOneof("event")
                # It may be handed back before it was admitted: the worker's limits have changed.
                if event != "preempted" and self._target.done() == (event == "admitted"):
                    raise UnavailableError(f"{peer} sent {event} where it may not")
                ended = event in ("finished", "preempted")
                await self._on_decode_event(response, locally)
        if not ended:
            raise UnavailableError(f"{peer} ended the request early")

    async def _on_decode_event(self, response: decode_pb2.DecodeResponse, locally: bool) -> None:
        match response.WhichOneof("event"):
            case "admitted":
                self._admitted(response.admitted, locally)
            case "tokens":
                # This leg's connection may be quicker than the one that carries the first token.
                await self._first_passed_on.wait()
                await self.listener.on_tokens(response.tokens)
                if locally:
                    self._prefilled()
            case "prompt_logprobs":
                await self.listener.on_prompt_logprobs(response.prompt_logprobs)
            case "finished":
                self._decoded(response.finished, locally)
            case "preempted":
                address, reason = self.placement.decode.address, response.preempted.reason
                logger.info("decode worker %s handed %s back: %s", address, self.job.request_id, reason)
                # The prefill leg goes on to its own end, if it has begun: it may still bring the first token.
                self.preempted = True
                self._target.cancel()

    async def _prefill_leg(self, prefill: Worker, end_decode_leg: Callable[[], object]) -> None:
        request = prefill_pb2.PrefillRequest(**self.job.fields, sampling=self.job.sampling, target=await self._target)
        call = PrefillServiceStub(prefill.channel).Prefill(request, timeout=self.job.timeout)
        peer = f"prefill worker {prefill.address}"
        ended = False
        try:
            async with _leg(call, peer) as responses:
                async for response in responses:
                    match response.WhichOneof("event"):
                        case "prompt_logprobs":
                            await self.listener.on_prompt_logprobs(response.prompt_logprobs)
                        case "first_token":
                            await self.listener.on_tokens(response.first_token)
                            self._first_passed_on.set()
                            if response.first_token.finish_reason:
                                end_decode_leg()
                        case "finished":
                            ended = True
                            self._handed_over(response.finished)
            if not ended:
                raise UnavailableError(f"{peer} ended the request early")
        except (KvbatonError, TimeoutError) as error:
            # Once the decode worker has handed the request back the KV is of no use, and so is its hand-off.
            if not self.preempted:
                raise
            logger.info("%s, too late to matter: %s", peer, error)
        self._prefilled()

    def _admitted(self, admitted: decode_pb2.DecodeAdmitted, locally: bool) -> None:
        self.timings.decode_admit_seconds = admitted.wait_seconds
        if locally:
            self.cached_tokens = admitted.num_cached_tokens
        self._target.set_result(
            prefill_pb2.TransferTarget(
                endpoint=kv_endpoint(self.placement.decode.address, admitted.kv_endpoint, admitted.kv_port),
                ticket=admitted.ticket,
                attempt=1,
                num_cached_tokens=admitted.num_cached_tokens,
            )
        )

    def _prefilled(self) -> None:
        self._prefill_load.close()
        self.listener.on_prefix_ready()

    def _decoded(self, finished: decode_pb2.DecodeFinished, locally: bool) -> None:
        self.timings.decode_wait_seconds = finished.wait_seconds
        self.timings.decode_seconds = finished.decode_seconds
        if locally:
            self.timings.prefill_queue_seconds = finished.prefill_queue_seconds
            self.timings.prefill_compute_seconds = finished.prefill_compute_seconds

    def _handed_over(self, finished: prefill_pb2.PrefillFinished) -> None:
        self.cached_tokens = finished.cached_tokens
        self.timings.prefill_queue_seconds = finished.queue_seconds
        self.timings.prefill_compute_seconds = finished.compute_seconds
        if finished.HasField("transfer"):
            self.timings.transfer.CopyFrom(finished.transfer)


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
