"""n answers to one prompt: the first goes ahead, the others follow to where its KV is, and all share one fate."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvbaton.engine.errors import OverloadedError
from kvbaton.engine.sampling import MAX_SEED
from kvbaton.router.dispatch import SEED_STRIDE
from kvbaton.v1 import decode_pb2
from support.fakes import Script, forever, token_event
from support.routes import (
    ADMITTED,
    ADMITTED_LOCALLY,
    DECODED,
    FILLED,
    LENGTH,
    PREEMPTED,
    STOP,
    Route,
    fails,
    first,
    in_turn,
    logprobs,
    more,
    routed,
    writes,
)

LOCAL = writes(ADMITTED_LOCALLY, more(0, 10), more(1, 11, finish=LENGTH), DECODED)
REMOTE = writes(ADMITTED, more(1, 11, finish=LENGTH), DECODED)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def settled() -> None:
    """Give whoever could go on the time to do so."""
    for _ in range(50):
        await asyncio.sleep(0.001)


async def test_every_answer_is_a_request_of_its_own_with_a_seed_of_its_own() -> None:
    async with routed(writes(first(), FILLED), REMOTE, n=3, seed=MAX_SEED) as route:
        await route.run()
        assert [route.tokens(sequence) for sequence in range(3)] == [[10, 11]] * 3
        seeds = [(MAX_SEED + number * SEED_STRIDE) % 2**64 for number in range(3)]
        for requests in (route.prefill.requests, route.decode.requests):
            assert [request.sampling.seed for request in requests[:1]] == seeds[:1]
            assert {request.sampling.seed for request in requests} == set(seeds)
            assert {request.request_id for request in requests} == {"req", "req#1", "req#2"}
            assert not any(request.sampling.HasField("n") for request in requests)
        assert route.num_choices == 1, "all of them go where the first one went"
        assert route.dispatch.num_tokens == 6


async def test_the_others_start_when_the_prompts_kv_is_in_place() -> None:
    applied = asyncio.Event()

    async def prefill(request: Any, context: Any) -> None:
        await context.write(first())
        await applied.wait()
        await context.write(FILLED)

    async with routed(prefill, REMOTE, n=2) as route, asyncio.TaskGroup() as group:
        group.create_task(route.run())
        await until(lambda: route.tokens() == [10, 11])
        await settled()
        assert len(route.decode.requests) == 1
        applied.set()
        await until(lambda: len(route.decode.requests) == 2)


async def test_on_one_worker_they_start_at_the_first_token() -> None:
    go_on, start = asyncio.Event(), asyncio.Event()

    async def ahead(request: Any, context: Any) -> None:
        await context.write(ADMITTED_LOCALLY)
        await start.wait()
        await context.write(more(0, 10))
        await go_on.wait()
        await context.write(more(1, 11, finish=LENGTH))
        await context.write(DECODED)

    async with routed(forever, in_turn(ahead, LOCAL), n=2, locally=True) as route, asyncio.TaskGroup() as group:
        group.create_task(route.run())
        await until(lambda: route.decode.requests)
        await settled()
        assert len(route.decode.requests) == 1
        start.set()
        await until(lambda: route.tokens(1) == [10, 11])
        assert route.tokens(0) == [10]
        go_on.set()


async def test_they_start_too_when_the_first_one_ends_at_its_first_token() -> None:
    prefill = in_turn(writes(first(finish=STOP), FILLED), writes(first(), FILLED))
    async with routed(prefill, in_turn(writes(ADMITTED, then=forever), REMOTE), n=2) as route:
        await route.run()
        assert [route.tokens(0), route.tokens(1)] == [[10], [10, 11]]
        assert [answer.finish_reason for answer in route.dispatch.answers] == [STOP, LENGTH]


async def test_they_start_too_when_the_first_one_is_handed_back() -> None:
    decode = in_turn(writes(ADMITTED_LOCALLY, PREEMPTED), LOCAL, LOCAL)
    async with routed(forever, decode, n=2, locally=True) as route:
        await route.run()
        assert [route.tokens(0), route.tokens(1)] == [[10, 11], [10, 11]]
        assert [answer.num_resumes for answer in route.dispatch.answers] == [1, 0]


async def test_they_go_elsewhere_when_those_workers_cannot_be_used_any_more() -> None:
    async def prefill(request: Any, context: Any) -> None:
        await context.write(first())
        route.workers[0].problem = "draining"
        await context.write(FILLED)

    async with routed(prefill, REMOTE, n=2) as route:
        await route.run()
        assert route.num_choices == 2


async def test_their_prompts_are_no_load_to_speak_of() -> None:
    def loads(route: Route) -> list[int]:
        return [worker.tokens_in_flight for worker in route.workers]

    decode = in_turn(writes(ADMITTED_LOCALLY, more(0, 10), then=forever), writes(ADMITTED_LOCALLY, then=forever))
    async with routed(forever, decode, n=3, locally=True) as route, asyncio.TaskGroup() as group:
        running = group.create_task(route.run())
        await until(lambda: route.decode.requests)
        await until(lambda: len(route.decode.requests) == 3)
        assert loads(route) == [0, 2]
        assert [worker.num_in_flight for worker in route.workers] == [0, 3]
        running.cancel()


async def test_prompt_logprobs_are_passed_on_once() -> None:
    local = decode_pb2.DecodeResponse(prompt_logprobs=logprobs(6, 7))
    decode = writes(ADMITTED_LOCALLY, local, more(0, 10), more(1, 11, finish=LENGTH), DECODED)
    async with routed(forever, decode, n=2, locally=True, prompt_logprobs=0) as route:
        await route.run()
        assert [request.sampling.HasField("prompt_logprobs") for request in route.decode.requests] == [True, False]
        assert [response.HasField("prompt_logprobs") for response in route.emitted].count(True) == 1
        assert route.emitted[0].HasField("prompt_logprobs")


@pytest.mark.parametrize("failing", [0, 1])
async def test_an_error_of_one_ends_all(failing: int) -> None:
    lasting = writes(ADMITTED_LOCALLY, more(0, 10), then=forever)

    async def fail(request: Any, context: Any) -> None:
        await context.write(ADMITTED_LOCALLY)
        await context.write(more(0, 10))
        await until(lambda: len(route.decode.requests) == 3)
        raise OverloadedError("full")

    scripts: list[Script] = [lasting, lasting, lasting]
    scripts[failing] = fail
    async with routed(forever, in_turn(*scripts), n=3, locally=True) as route:
        assert isinstance(await route.error(), OverloadedError)
        await route.decode.cancelled.wait()


async def test_an_error_before_the_others_started_starts_none() -> None:
    async with routed(forever, fails(OverloadedError("full")), n=3, locally=True) as route:
        assert isinstance(await route.error(), OverloadedError)
        assert len(route.decode.requests) == 1


async def test_a_client_that_goes_ends_all() -> None:
    decode = writes(ADMITTED_LOCALLY, more(0, 10), then=forever)
    async with routed(forever, decode, n=2, locally=True) as route:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(route.run())
            await until(lambda: route.tokens(1))
            running.cancel()
        await until(lambda: route.decode.cancelled.is_set())


async def test_tokens_carry_the_number_of_their_answer() -> None:
    async with routed(forever, LOCAL, n=2, locally=True) as route:
        await route.run()
        events = [response.tokens for response in route.emitted]
        expected = token_event(1, 11, finish=LENGTH)
        expected.sequence = 1
        assert expected in events
