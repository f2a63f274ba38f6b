"""An answer over several attempts: what is handed back goes on from its tokens, each index once, and not for ever."""

import asyncio
from typing import Any

import pytest

from kvbaton.engine.errors import OverloadedError, TransferRejectedError, UnavailableError
from kvbaton.engine.tokens import pack_token_ids, unpack_token_ids
from kvbaton.router import resume
from kvbaton.router.answer import add_timings
from kvbaton.router.registry import Placement
from kvbaton.router.resume import FRUITFUL_TOKENS, ResumeBudget
from kvbaton.v1 import decode_pb2
from kvbaton.v1 import types_pb2 as types
from support.fakes import Script, forever
from support.routes import (
    ADMITTED,
    ADMITTED_LOCALLY,
    DECODED,
    FILLED,
    LENGTH,
    PREEMPTED,
    STOP,
    fails,
    first,
    in_turn,
    logprobs,
    more,
    routed,
    writes,
)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LONGEST_WAIT_SECONDS", 0.0)


async def test_a_request_that_is_handed_back_goes_on_from_its_tokens() -> None:
    prefill = in_turn(writes(first(), FILLED), writes(first(12, index=2), FILLED))
    decode = in_turn(writes(ADMITTED, more(1, 11), PREEMPTED), writes(ADMITTED, more(3, 13, finish=LENGTH), DECODED))
    async with routed(prefill, decode) as route:
        await route.run()
        assert route.tokens() == [10, 11, 12, 13]
        assert [response.tokens.first_index for response in route.emitted] == [0, 1, 2, 3]
        for requests in (route.prefill.requests, route.decode.requests):
            assert [unpack_token_ids(r.output_token_ids, "") for r in requests] == [[], [10, 11]]
            assert {r.prompt_token_ids for r in requests} == {pack_token_ids([5, 6, 7])}
            assert [(r.sampling.seed, r.sampling.max_tokens, r.priority) for r in requests] == [(7, 4, -3)] * 2
        answer = route.dispatch.first
        assert (answer.num_resumes, answer.finish_reason, route.num_choices) == (1, LENGTH, 2)


async def test_a_resumed_request_may_end_with_its_first_new_token() -> None:
    prefill = in_turn(writes(first(), FILLED), writes(first(12, index=2, finish=STOP), FILLED))
    decode = in_turn(writes(ADMITTED, more(1, 11), PREEMPTED), writes(ADMITTED, then=forever))
    async with routed(prefill, decode) as route:
        await route.run()
        assert (route.tokens(), route.dispatch.first.finish_reason) == ([10, 11, 12], STOP)
        await route.decode.cancelled.wait()


async def test_a_worker_that_serves_both_legs_hands_back_too() -> None:
    decode = in_turn(
        writes(ADMITTED_LOCALLY, more(0, 10), PREEMPTED),
        writes(ADMITTED_LOCALLY, more(1, 11), PREEMPTED),
        writes(ADMITTED_LOCALLY, more(2, 12, finish=STOP), DECODED),
    )
    async with routed(forever, decode, locally=True) as route:
        await route.run()
        assert (route.tokens(), route.dispatch.first.num_resumes) == ([10, 11, 12], 2)
        assert [r.output_token_ids for r in route.decode.requests] == [
            pack_token_ids(tokens) for tokens in ([], [10], [10, 11])
        ]


async def test_a_request_may_be_handed_back_before_it_is_admitted() -> None:
    decode = in_turn(writes(PREEMPTED), writes(ADMITTED, more(1, 11, finish=STOP), DECODED))
    async with routed(writes(first(), FILLED), decode) as route:
        await route.run()
        answer = route.dispatch.first
        assert (route.tokens(), answer.num_resumes, answer.cached_tokens) == ([10, 11], 1, 3)
        assert len(route.prefill.requests) == 1, "no prompt is computed without a place for its KV"


async def test_the_prompts_logprobs_come_once() -> None:
    told = decode_pb2.DecodeResponse(prompt_logprobs=logprobs(6, 7))
    decode = in_turn(
        writes(ADMITTED_LOCALLY, told, more(0, 10), PREEMPTED),
        writes(ADMITTED_LOCALLY, told, more(1, 11, finish=STOP), DECODED),
    )
    async with routed(forever, decode, locally=True, prompt_logprobs=0) as route:
        await route.run()
        assert [request.sampling.HasField("prompt_logprobs") for request in route.decode.requests] == [True, False]
        assert [response.WhichOneof("event") for response in route.emitted] == ["prompt_logprobs", "tokens", "tokens"]


async def test_each_attempt_is_placed_anew() -> None:
    first_try = writes(ADMITTED, more(1, 11), PREEMPTED)
    prefill = writes(first(), FILLED)
    async with routed(prefill, first_try) as route, routed(prefill, prefill) as other:
        other.decode.script = writes(ADMITTED_LOCALLY, more(2, 12, finish=STOP), DECODED)

        def choose() -> Placement:
            return Placement(None, other.workers[1], "the other one")

        route.dispatch.first.choose = choose
        await route.run()
        assert route.tokens() == [10, 11, 12]
        assert route.dispatch.first.placement == choose()
        assert (len(route.decode.requests), len(other.decode.requests)) == (1, 1)
        assert other.decode.requests[0].prefill_locally


async def test_what_is_handed_back_with_its_last_token_has_ended() -> None:
    decode = writes(ADMITTED, more(1, 11, finish=STOP), PREEMPTED)
    async with routed(writes(first(), FILLED), decode) as route:
        await route.run()
        answer = route.dispatch.first
        assert (route.tokens(), answer.finish_reason, answer.num_resumes) == ([10, 11], STOP, 0)


async def test_a_hand_back_that_overtakes_the_first_token_waits_for_it() -> None:
    handed_back = asyncio.Event()

    async def late(request: Any, context: Any) -> None:
        await handed_back.wait()
        await context.write(first())
        await context.write(FILLED)

    async def early(request: Any, context: Any) -> None:
        await context.write(ADMITTED)
        await context.write(PREEMPTED)
        handed_back.set()

    prefill = in_turn(late, writes(first(11, index=1, finish=STOP), FILLED))
    async with routed(prefill, in_turn(early, writes(ADMITTED, then=forever))) as route:
        await route.run()
        assert (route.tokens(), route.dispatch.first.num_resumes) == ([10, 11], 1)


@pytest.mark.parametrize("error", [TransferRejectedError("the request has ended"), TimeoutError("late")])
@pytest.mark.parametrize("tokens", [[], [10]])
async def test_a_prefill_leg_that_fails_after_the_hand_back_does_no_harm(
    error: Exception, tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def prefill(request: Any, context: Any) -> None:
        for token_id in tokens:
            await context.write(first(token_id))
        while "handed req back: no block is free" not in caplog.text:
            await asyncio.sleep(0)
        raise error

    last = writes(first(11, index=len(tokens), finish=STOP), FILLED)
    decode = in_turn(writes(ADMITTED, PREEMPTED), writes(ADMITTED, then=forever))
    async with routed(in_turn(prefill, last), decode) as route:
        await route.run()
        assert (route.tokens(), route.dispatch.first.num_resumes) == ([*tokens, 11], 1)
        assert [unpack_token_ids(r.output_token_ids, "") for r in route.decode.requests] == [[], tokens]


async def test_a_resume_that_repeats_a_token_is_refused() -> None:
    prefill = in_turn(writes(first(), FILLED), writes(first(11, index=1), FILLED))
    decode = in_turn(writes(ADMITTED, more(1, 11), PREEMPTED), writes(ADMITTED, then=forever))
    async with routed(prefill, decode) as route:
        error = await route.error()
        with pytest.raises(UnavailableError, match="token 1 came where 2 was next"):
            raise error
        assert route.tokens() == [10, 11]


@pytest.mark.parametrize("failing", [fails(OverloadedError("full")), fails(UnavailableError("gone"))])
async def test_an_error_of_a_later_attempt_is_the_requests(failing: Script) -> None:
    decode = in_turn(writes(ADMITTED, more(1, 11), PREEMPTED), failing)
    async with routed(writes(first(), FILLED), decode) as route:
        assert isinstance(await route.error(), OverloadedError | UnavailableError)
        assert route.tokens() == [10, 11]


async def test_a_request_that_gets_nowhere_is_given_up() -> None:
    number = 0

    async def decode(request: Any, context: Any) -> None:
        nonlocal number
        await context.write(ADMITTED_LOCALLY)
        await context.write(more(number, 10))
        number += 1
        await context.write(PREEMPTED)

    async with routed(forever, decode, locally=True) as route:
        error = await route.error()
        with pytest.raises(OverloadedError, match="handed back 51 times in a row with fewer than 8 new tokens"):
            raise error
        assert len(route.decode.requests) == 51


async def test_a_client_that_goes_between_two_attempts_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "FIRST_WAIT_SECONDS", 3600.0)
    monkeypatch.setattr(resume, "LONGEST_WAIT_SECONDS", 3600.0)
    async with routed(writes(first(), FILLED), writes(ADMITTED, PREEMPTED)) as route:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(route.run())
            while not route.dispatch.first.num_resumes:
                await asyncio.sleep(0)
            running.cancel()
        assert running.cancelled()
        assert len(route.decode.requests) == 1


async def test_the_deadline_spans_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LONGEST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(resume, "FIRST_WAIT_SECONDS", 0.3)
    left: list[float] = []

    def measured(then: Script) -> Script:
        async def script(request: Any, context: Any) -> None:
            left.append(context.time_remaining())
            await then(request, context)

        return script

    decode = in_turn(
        writes(ADMITTED_LOCALLY, more(0, 10), PREEMPTED), writes(ADMITTED_LOCALLY, more(1, 11, finish=STOP), DECODED)
    )
    async with routed(forever, measured(decode), locally=True) as route:
        # Of longer deadlines gRPC tells the peer little more than the whole seconds.
        await route.run(timeout=2)
        assert left[1] < left[0] - 0.2


def test_a_budget_waits_longer_each_time_until_an_attempt_gets_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LONGEST_WAIT_SECONDS", 0.1)
    budget = ResumeBudget()
    assert [budget.wait_after(1) for _ in range(5)] == [0.02, 0.04, 0.08, 0.1, 0.1]
    assert budget.wait_after(FRUITFUL_TOKENS) == 0
    assert budget.wait_after(FRUITFUL_TOKENS - 1) == 0.02


def test_the_workers_times_add_up_over_attempts() -> None:
    total = types.Timings()
    transfer = types.TransferStats(transport="grpc", payload_bytes=10, frames=1, seconds=1, overlapped_share=0.5)
    add_timings(total, types.Timings(decode_admit_seconds=1, transfer=transfer))
    assert total == types.Timings(decode_admit_seconds=1, transfer=transfer)
    transfer = types.TransferStats(transport="grpc", payload_bytes=30, frames=2, seconds=3, overlapped_share=0.9)
    add_timings(total, types.Timings(decode_admit_seconds=0.5, decode_seconds=2, transfer=transfer))
    add_timings(total, types.Timings(decode_seconds=1))
    assert (total.decode_admit_seconds, total.decode_seconds) == (1.5, 3)
    assert (total.transfer.payload_bytes, total.transfer.frames, total.transfer.seconds) == (40, 3, 4)
    assert total.transfer.overlapped_share == pytest.approx(0.8)
