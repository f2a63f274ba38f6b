"""A router's dispatch over fake workers, and the events that those send."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvbaton.engine.sampling import SamplingParams
from kvbaton.router.admission import AdmittedRequest
from kvbaton.router.dispatch import Dispatch
from kvbaton.router.registry import DECODE, PREFILL, UNIFIED, Placement, Worker
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import channel
from kvbaton.v1 import decode_pb2, prefill_pb2, worker_pb2
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import PATIENCE, FakeDecode, FakePrefill, Script, model_info, served, token_event

TICKET = bytes(range(16))
LENGTH, STOP = types.FINISH_REASON_LENGTH, types.FINISH_REASON_STOP
LIMITS = worker_pb2.EngineLimits(max_prefill_tokens=8, max_decode_seqs=8)

ADMITTED = decode_pb2.DecodeResponse(
    admitted=decode_pb2.DecodeAdmitted(ticket=TICKET, num_cached_tokens=2, kv_port=4321, wait_seconds=0.5)
)
ADMITTED_LOCALLY = decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(num_cached_tokens=2, wait_seconds=0.5))
DECODED = decode_pb2.DecodeResponse(
    finished=decode_pb2.DecodeFinished(
        wait_seconds=0.25, decode_seconds=2, prefill_queue_seconds=0.0625, prefill_compute_seconds=4
    )
)
PREEMPTED = decode_pb2.DecodeResponse(preempted=decode_pb2.DecodePreempted(reason="no block is free"))
FILLED = prefill_pb2.PrefillResponse(
    finished=prefill_pb2.PrefillFinished(
        queue_seconds=0.125,
        compute_seconds=1,
        cached_tokens=3,
        transfer=types.TransferStats(transport="grpc", frames=7, payload_bytes=100, seconds=3, overlapped_share=0.5),
    )
)


def first(token_id: int = 10, finish: Any = 0, index: int = 0) -> prefill_pb2.PrefillResponse:
    return prefill_pb2.PrefillResponse(first_token=token_event(index, token_id, finish=finish))


def more(index: int, *token_ids: int, finish: Any = 0) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(tokens=token_event(index, *token_ids, finish=finish))


def logprobs(*token_ids: int) -> types.PromptLogprobs:
    return types.PromptLogprobs(tokens=[types.TokenLogprobs(token_id=token_id, rank=1) for token_id in token_ids])


def writes(*responses: Any, then: Script | None = None) -> Script:
    async def script(request: Any, context: Any) -> None:
        for response in responses:
            await context.write(response)
        if then is not None:
            await then(request, context)

    return script


def fails(error: Exception) -> Script:
    async def script(request: Any, context: Any) -> None:
        raise error

    return script


def in_turn(*scripts: Script) -> Script:
    """One script for each request, in the order in which they come; the last one for all that follow."""
    calls = itertools.count()

    async def script(request: Any, context: Any) -> None:
        await scripts[min(next(calls), len(scripts) - 1)](request, context)

    return script


class Route:
    """Two fake workers and a router's dispatch over them; on `decode` alone when `locally` is set."""

    def __init__(self, prefill: Script, decode: Script) -> None:
        self.prefill, self.decode = FakePrefill(prefill), FakeDecode(decode)
        self.emitted: list[pb.GenerateResponse] = []
        self.workers: list[Worker] = []
        self.num_choices = 0
        self.locally = False
        self.dispatch: Dispatch

    async def emit(self, response: pb.GenerateResponse) -> None:
        self.emitted.append(response)

    def choose(self) -> Placement:
        self.num_choices += 1
        return Placement(None if self.locally else self.workers[0], self.workers[1], "the only one")

    def tokens(self, sequence: int = 0) -> list[int]:
        events = [response.tokens for response in self.emitted if response.HasField("tokens")]
        return [token for event in events if event.sequence == sequence for token in event.token_ids]

    async def run(self, timeout: float | None = PATIENCE) -> None:
        await self.dispatch.run(timeout)

    async def error(self, timeout: float | None = PATIENCE) -> BaseException:
        with pytest.raises(BaseExceptionGroup) as caught:
            await self.dispatch.run(timeout)
        return root_cause(caught.value)


@asynccontextmanager
async def routed(
    prefill: Script, decode: Script, *, locally: bool = False, n: int = 1, **sampling: Any
) -> AsyncIterator[Route]:
    """A request of three tokens, on its way over fake workers that follow these scripts."""
    route = Route(prefill, decode)
    route.locally = locally
    async with asyncio.timeout(PATIENCE), served(route.prefill) as p, served(route.decode) as d:
        async with channel(p) as to_prefill, channel(d) as to_decode:
            route.workers = [Worker(p, PREFILL, to_prefill), Worker(d, UNIFIED if locally else DECODE, to_decode)]
            for worker in route.workers:
                worker.connected, worker.problem = True, ""
                worker.status = worker_pb2.WorkerStatus(role=worker.role, model=model_info(), limits=LIMITS)
            values = {"max_tokens": 4, "seed": 7, "temperature": 0.5, **sampling}
            request = AdmittedRequest("req", [5, 6, 7], SamplingParams(**values), n=n, priority=-3, cache_salt="salt")
            route.dispatch = Dispatch(request, route.choose, route.emit)
            yield route
        assert [worker.num_in_flight for worker in route.workers] == [0, 0]
        assert [worker.tokens_in_flight for worker in route.workers] == [0, 0]
