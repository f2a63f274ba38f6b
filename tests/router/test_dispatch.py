"""A request's two legs over fake workers: tokens pass on in order and once, an end of one leg is the right end of the
other, and every way in which a worker can fail or break its promises has its error.
"""

import asyncio
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
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import inference_pb2 as pb
from support.fakes import PATIENCE, Script, forever
from support.routes import (
    ADMITTED,
    ADMITTED_LOCALLY,
    DECODED,
    FILLED,
    LENGTH,
    STOP,
    TICKET,
    fails,
    first,
    logprobs,
    more,
    routed,
    writes,
)


async def test_a_request_takes_both_legs_and_its_tokens_come_in_order() -> None:
    decode = writes(ADMITTED, more(1, 11), more(2, 12, 13, finish=LENGTH), DECODED)
    async with routed(writes(first(), FILLED), decode) as route:
        await route.run()
        assert route.tokens() == [10, 11, 12, 13]
        assert [response.tokens.first_index for response in route.emitted] == [0, 1, 2]
        answer = route.dispatch.first
        assert (answer.finish_reason, route.dispatch.num_tokens, answer.cached_tokens) == (LENGTH, 4, 3)
        assert (answer.num_resumes, route.num_choices) == (0, 1)
        timings = answer.timings
        assert (timings.decode_admit_seconds, timings.decode_wait_seconds, timings.decode_seconds) == (0.5, 0.25, 2)
        assert (timings.prefill_queue_seconds, timings.prefill_compute_seconds) == (0.125, 1)
        assert timings.transfer.frames == 7


async def test_both_workers_get_the_request_and_the_prefill_worker_the_ticket() -> None:
    async with routed(writes(first(), FILLED), writes(ADMITTED, more(1, 11, finish=STOP), DECODED)) as route:
        await route.run()
        (to_decode,), (to_prefill,) = route.decode.requests, route.prefill.requests
        for request in (to_decode, to_prefill):
            assert request.request_id == "req"
            assert (request.prompt_token_ids, request.output_token_ids) == (pack_token_ids([5, 6, 7]), b"")
            assert (request.priority, request.cache_salt) == (-3, "salt")
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
        assert route.tokens() == [10, 11, 12]


@pytest.mark.parametrize("reason", [STOP, LENGTH])
async def test_a_first_token_that_ends_the_request_ends_the_decode_leg(reason: Any) -> None:
    async with routed(writes(first(finish=reason), FILLED), writes(ADMITTED, then=forever)) as route:
        await route.run()
        assert (route.tokens(), route.dispatch.first.finish_reason) == ([10], reason)
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
        assert route.tokens() == [10, 11]
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
        (writes(first(index=1), FILLED), writes(ADMITTED, then=forever), "token 1 came where 0 was next"),
        (writes(first(), FILLED), writes(ADMITTED, more(1, 11), DECODED), "finished before the last token"),
        (
            writes(first(), FILLED),
            writes(ADMITTED, more(1, 11, finish=STOP), more(2, 12), then=forever),
            "token 2 came where none was next",
        ),
        (writes(first(), FILLED), writes(ADMITTED, ADMITTED, then=forever), "sent admitted where it may not"),
        (writes(first(), FILLED), writes(more(1, 11), then=forever), "sent tokens where it may not"),
        (writes(first(), FILLED), writes(DECODED), "sent finished where it may not"),
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

        async def emit(response: pb.GenerateResponse) -> None:
            emitted.set()

        route.dispatch.first.emit = emit
        async with asyncio.TaskGroup() as group:
            running = group.create_task(route.run())
            await emitted.wait()
            assert [worker.num_in_flight for worker in route.workers] == [1, 1]
            assert [worker.tokens_in_flight for worker in route.workers] == [3, 0]
            running.cancel()
        assert running.cancelled()
        await route.decode.cancelled.wait()
        await route.prefill.cancelled.wait()


async def test_a_worker_that_serves_both_legs_is_asked_alone() -> None:
    decode = writes(ADMITTED_LOCALLY, more(0, 10), more(1, 11, 12, finish=STOP), DECODED)
    async with routed(fails(ValueError("not asked")), decode, locally=True) as route:
        await route.run()
        (asked,) = route.decode.requests
        assert asked.prefill_locally
        assert (asked.priority, asked.cache_salt, asked.output_token_ids) == (-3, "salt", b"")
        answer = route.dispatch.first
        assert (route.tokens(), answer.finish_reason, answer.cached_tokens) == ([10, 11, 12], STOP, 2)
        timings = answer.timings
        assert (timings.prefill_queue_seconds, timings.prefill_compute_seconds) == (0.0625, 4)
        assert (timings.decode_admit_seconds, timings.decode_wait_seconds, timings.decode_seconds) == (0.5, 0.25, 2)
        assert not timings.HasField("transfer")
        assert route.prefill.requests == []


async def test_the_load_of_a_local_prompt_is_counted_until_its_first_token() -> None:
    admitted, go_on = asyncio.Event(), asyncio.Event()

    async def decode(request: Any, context: Any) -> None:
        await context.write(ADMITTED_LOCALLY)
        admitted.set()
        await go_on.wait()
        await context.write(more(0, 10))
        await forever()

    async with routed(forever, decode, locally=True) as route, asyncio.TaskGroup() as group:
        running = group.create_task(route.run())
        await admitted.wait()
        worker = route.workers[1]
        assert (worker.num_in_flight, worker.tokens_in_flight) == (1, 3)
        go_on.set()
        while not route.emitted or worker.tokens_in_flight:
            await asyncio.sleep(0)
        assert (worker.num_in_flight, worker.tokens_in_flight) == (1, 0)
        running.cancel()


@pytest.mark.parametrize("locally", [False, True])
async def test_prompt_logprobs_come_from_where_the_prompt_is_computed(locally: bool) -> None:
    parts = [logprobs(6), logprobs(7)]
    prefill = writes(*(prefill_pb2.PrefillResponse(prompt_logprobs=part) for part in parts), first(finish=STOP), FILLED)
    local = (decode_pb2.DecodeResponse(prompt_logprobs=part) for part in parts)
    decode = writes(ADMITTED_LOCALLY, *local, more(0, 10, finish=STOP), DECODED)
    decode = decode if locally else writes(ADMITTED, then=forever)
    async with routed(prefill, decode, locally=locally, prompt_logprobs=2) as route:
        await route.run()
        assert [request.sampling.prompt_logprobs for request in route.prefill.requests] == ([] if locally else [2])
        # A worker that has to compute the whole prompt makes no use of what it has cached.
        assert [request.sampling.HasField("prompt_logprobs") for request in route.decode.requests] == [locally]
        assert [response.WhichOneof("event") for response in route.emitted] == ["prompt_logprobs"] * 2 + ["tokens"]
        assert [response.prompt_logprobs for response in route.emitted[:2]] == parts
