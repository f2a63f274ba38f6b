"""A request's two legs over fake workers: tokens pass on in order and once, an end of one leg is the right end of the
other, and every way in which a worker can fail or break its promises has its error.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvbaton.engine.errors import (
    InvalidArgumentError,
    KvbatonError,
    NotFoundError,
    OverloadedError,
    TransferRejectedError,
    UnavailableError,
)
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.admission import AdmittedRequest
from kvbaton.router.dispatch import Dispatch
from kvbaton.router.registry import DECODE, PREFILL, Worker
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import channel
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types
from support.fakes import PATIENCE, FakeDecode, FakePrefill, Script, forever, served, token_event

TICKET = bytes(range(16))
LENGTH, STOP = types.FINISH_REASON_LENGTH, types.FINISH_REASON_STOP
ADMITTED = decode_pb2.DecodeResponse(
    admitted=decode_pb2.DecodeAdmitted(ticket=TICKET, num_cached_tokens=2, kv_port=4321, wait_seconds=0.5)
)
DECODED = decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished(wait_seconds=0.25, decode_seconds=2))
FILLED = prefill_pb2.PrefillResponse(
    finished=prefill_pb2.PrefillFinished(
        queue_seconds=0.125, compute_seconds=1, cached_tokens=3, transfer=types.TransferStats(frames=7)
    )
)


def first(token_id: int = 10, finish: Any = 0) -> prefill_pb2.PrefillResponse:
    return prefill_pb2.PrefillResponse(first_token=token_event(0, token_id, finish=finish))


def more(index: int, *token_ids: int, finish: Any = 0) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(tokens=token_event(index, *token_ids, finish=finish))


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


class Route:
    """Two fake workers and a router's dispatch over them."""

    def __init__(self, prefill: Script, decode: Script) -> None:
        self.prefill, self.decode = FakePrefill(prefill), FakeDecode(decode)
        self.emitted: list[types.TokenEvent] = []
        self.workers: list[Worker] = []
        self.dispatch: Dispatch

    async def emit(self, tokens: types.TokenEvent) -> None:
        self.emitted.append(tokens)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.emitted for token in event.token_ids]

    async def run(self, timeout: float | None = PATIENCE) -> None:
        await self.dispatch.run(timeout)

    async def error(self, timeout: float | None = PATIENCE) -> BaseException:
        with pytest.raises(BaseExceptionGroup) as caught:
            await self.dispatch.run(timeout)
        return root_cause(caught.value)


@asynccontextmanager
async def routed(prefill: Script, decode: Script) -> AsyncIterator[Route]:
    route = Route(prefill, decode)
    async with asyncio.timeout(PATIENCE), served(route.prefill) as p, served(route.decode) as d:
        async with channel(p) as to_prefill, channel(d) as to_decode:
            route.workers = [Worker(p, PREFILL, to_prefill), Worker(d, DECODE, to_decode)]
            sampling = SamplingParams(max_tokens=4, seed=7, temperature=0.5)
            request = AdmittedRequest("req", [5, 6, 7], sampling)
            route.dispatch = Dispatch(request, route.workers[0], route.workers[1], route.emit)
            yield route
        assert [worker.num_in_flight for worker in route.workers] == [0, 0]
        assert [worker.tokens_in_flight for worker in route.workers] == [0, 0]


async def test_a_request_takes_both_legs_and_its_tokens_come_in_order() -> None:
    decode = writes(ADMITTED, more(1, 11), more(2, 12, 13, finish=LENGTH), DECODED)
    async with routed(writes(first(), FILLED), decode) as route:
        await route.run()
        assert route.tokens == [10, 11, 12, 13]
        assert [event.first_index for event in route.emitted] == [0, 1, 2]
        dispatch = route.dispatch
        assert (dispatch.finish_reason, dispatch.num_emitted, dispatch.cached_tokens) == (LENGTH, 4, 3)
        timings = dispatch.timings
        assert (timings.decode_admit_seconds, timings.decode_wait_seconds, timings.decode_seconds) == (0.5, 0.25, 2)
        assert (timings.prefill_queue_seconds, timings.prefill_compute_seconds) == (0.125, 1)
        assert timings.transfer.frames == 7


async def test_both_workers_get_the_request_and_the_prefill_worker_the_ticket() -> None:
    async with routed(writes(first(), FILLED), writes(ADMITTED, more(1, 11, finish=STOP), DECODED)) as route:
        await route.run()
        (to_decode,), (to_prefill,) = route.decode.requests, route.prefill.requests
        for request in (to_decode, to_prefill):
            assert request.request_id == "req"
            assert request.prompt_token_ids == pack_token_ids([5, 6, 7])
            assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.temperature) == (4, 7, 0.5)
        assert to_prefill.target == prefill_pb2.TransferTarget(
            endpoint="127.0.0.1:4321", ticket=TICKET, attempt=1, num_cached_tokens=2
        )


async def test_an_endpoint_that_the_decode_worker_names_is_used() -> None:
    admitted = decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(ticket=TICKET, kv_endpoint="kv.example:9"))
    async with routed(writes(first(), FILLED), writes(admitted, more(1, 11, finish=STOP), DECODED)) as route:
        await route.run()
        assert route.prefill.requests[0].target.endpoint == "kv.example:9"


async def test_tokens_that_overtake_the_first_are_held_back() -> None:
    overtaken = asyncio.Event()

    async def late(request: Any, context: Any) -> None:
        await overtaken.wait()
        await context.write(first())
        await context.write(FILLED)

    async def early(request: Any, context: Any) -> None:
        for response in (ADMITTED, more(1, 11), more(2, 12, finish=STOP), DECODED):
            await context.write(response)
        overtaken.set()

    async with routed(late, early) as route:
        await route.run()
        assert route.tokens == [10, 11, 12]


@pytest.mark.parametrize("reason", [STOP, LENGTH])
async def test_a_first_token_that_ends_the_request_ends_the_decode_leg(reason: Any) -> None:
    async with routed(writes(first(finish=reason), FILLED), writes(ADMITTED, then=forever)) as route:
        await route.run()
        assert (route.tokens, route.dispatch.finish_reason) == ([10], reason)
        await route.decode.cancelled.wait()


ERRORS: list[tuple[Exception, type[BaseException], str]] = [
    (InvalidArgumentError("prompt", "is odd"), InvalidArgumentError, "prompt: is odd"),
    (OverloadedError("full", 3), OverloadedError, "full"),
    (UnavailableError("draining"), UnavailableError, "draining"),
    (TransferRejectedError("crc"), TransferRejectedError, "crc"),
    (NotFoundError("no ticket"), UnavailableError, "worker .*: no ticket"),
    (TimeoutError("late"), TimeoutError, "late"),
    (ValueError("secret"), UnavailableError, "failed with INTERNAL"),
]


@pytest.mark.parametrize(("raised", "kind", "message"), ERRORS)
async def test_a_decode_error_is_the_requests_and_prefill_is_never_asked(
    raised: Exception, kind: type[BaseException], message: str
) -> None:
    async with routed(writes(first()), fails(raised)) as route:
        error = await route.error()
        with pytest.raises(kind, match=message):
            raise error
        assert route.prefill.requests == []


@pytest.mark.parametrize(("raised", "kind", "message"), ERRORS)
async def test_a_prefill_error_is_the_requests_and_ends_the_decode_leg(
    raised: Exception, kind: type[BaseException], message: str
) -> None:
    async with routed(fails(raised), writes(ADMITTED, then=forever)) as route:
        error = await route.error()
        with pytest.raises(kind, match=message):
            raise error
        await route.decode.cancelled.wait()


async def test_the_delay_of_an_overloaded_worker_is_kept() -> None:
    async with routed(writes(first()), fails(OverloadedError("full", 3))) as route:
        error = await route.error()
        assert isinstance(error, OverloadedError)
        assert error.retry_after_seconds == 3


async def test_a_decode_error_after_the_first_token_ends_the_prefill_leg() -> None:
    async def fail(request: Any, context: Any) -> None:
        raise OverloadedError("full")

    decode = writes(ADMITTED, more(1, 11), then=fail)
    async with routed(writes(first(), then=forever), decode) as route:
        assert isinstance(await route.error(), OverloadedError)
        assert route.tokens == [10, 11]
        await route.prefill.cancelled.wait()


@pytest.mark.parametrize(
    ("prefill", "decode", "problem"),
    [
        (
            writes(first(), FILLED),
            writes(ADMITTED, more(1, 11, finish=STOP)),
            "decode worker .* ended the request early",
        ),
        (writes(first()), writes(ADMITTED, then=forever), "prefill worker .* ended the request early"),
        (writes(), writes(ADMITTED, then=forever), "prefill worker .* ended the request early"),
        (writes(first(), FILLED), writes(), "decode worker .* ended the request early"),
        (writes(first(), FILLED), writes(ADMITTED, more(2, 12), then=forever), "token 2 came where 1 was next"),
        (writes(first(), FILLED), writes(ADMITTED, more(0, 10), then=forever), "token 0 came where 1 was next"),
        (
            writes(first(), FILLED),
            writes(ADMITTED, more(1, 11, 12), more(2, 12), then=forever),
            "token 2 came where 3 was next",
        ),
        (writes(first(), first(), FILLED), writes(ADMITTED, then=forever), "token 0 came where 1 was next"),
    ],
)
async def test_a_worker_that_breaks_its_promises_is_unavailable(prefill: Script, decode: Script, problem: str) -> None:
    async with routed(prefill, decode) as route:
        error = await route.error()
        with pytest.raises(UnavailableError, match=problem):
            raise error


async def test_what_is_left_of_the_deadline_goes_to_both_workers() -> None:
    left: list[float] = []

    def measured(then: Script) -> Script:
        async def script(request: Any, context: Any) -> None:
            left.append(context.time_remaining())
            await then(request, context)

        return script

    decode = writes(ADMITTED, more(1, 11, finish=STOP), DECODED)
    async with routed(measured(writes(first(), FILLED)), measured(decode)) as route:
        await route.run(timeout=PATIENCE / 2)
        assert len(left) == 2
        for seconds in left:
            assert 0 < seconds < PATIENCE


async def test_no_deadline_is_none_for_the_workers_either() -> None:
    left: list[float | None] = []

    async def script(request: Any, context: Any) -> None:
        left.append(context.time_remaining())
        raise UnavailableError("enough")

    async with routed(writes(first()), script) as route:
        assert isinstance(await route.error(timeout=None), KvbatonError)
        assert left == [None]


async def test_a_deadline_that_passes_ends_both_legs() -> None:
    async with routed(forever, writes(ADMITTED, then=forever)) as route:
        assert isinstance(await route.error(timeout=0.3), TimeoutError)
        await route.decode.cancelled.wait()
        await route.prefill.cancelled.wait()


async def test_a_client_that_goes_ends_both_legs() -> None:
    async with routed(writes(first(), then=forever), writes(ADMITTED, then=forever)) as route:
        emitted = asyncio.Event()

        async def emit(tokens: types.TokenEvent) -> None:
            emitted.set()

        route.dispatch.emit = emit
        async with asyncio.TaskGroup() as group:
            running = group.create_task(route.run())
            await emitted.wait()
            assert [worker.num_in_flight for worker in route.workers] == [1, 1]
            assert [worker.tokens_in_flight for worker in route.workers] == [3, 3]
            running.cancel()
        assert running.cancelled()
        await route.decode.cancelled.wait()
        await route.prefill.cancelled.wait()
