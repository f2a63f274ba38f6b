"""What a prefill worker sends of requests that are resumed, cached, stopped by a string, or asked for logprobs.

The fake model's token after n tokens is 10 + n; the prompt has ten.
"""

import asyncio
import functools
from typing import Any

import grpc
import pytest

from kvbaton.engine.output import NOT_A_NUMBER, SampledToken, StepOutput, TokenLogprobs
from kvbaton.engine.scheduler import Batch
from kvbaton.handoff import sender
from kvbaton.handoff.frames import FramePlanner
from kvbaton.v1 import prefill_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import BLOCK_SIZE, GEOMETRY, FakeTokenizer, Gate
from support.prefill_worker import BLOCKS, PROMPT, Worker, read_all, refusal, working


async def answered(worker: Worker, request: pb.PrefillRequest) -> tuple[types.TokenEvent, pb.PrefillFinished]:
    call = worker.call(request)
    first, finished = await call.read(), await call.read()
    assert await call.read() is grpc.aio.EOF
    return first.first_token, finished.finished


async def test_the_kv_of_tokens_that_were_generated_before_goes_with_the_prompts() -> None:
    async with working() as worker:
        worker.reservation.tokens = range(12)
        first, finished = await answered(worker, worker.request(output=[70, 71]))
        assert (first.first_index, list(first.token_ids)) == (2, [22])
        assert worker.applied == [22]
        assert finished.transfer.payload_bytes == GEOMETRY.token_bytes * 12
        assert worker.sink.content(BLOCKS, range(12)) == worker.source.content([0, 1, 2], range(12))


async def test_the_receiver_may_lack_but_the_last_of_the_tokens_generated_before() -> None:
    async with working() as worker:
        worker.reservation.tokens = range(11, 12)
        _, finished = await answered(worker, worker.request({"num_cached_tokens": 11}, output=[70, 71]))
        assert finished.transfer.payload_bytes == GEOMETRY.token_bytes
        error = await refusal(worker.call(worker.request({"num_cached_tokens": 12}, output=[70, 71])))
        assert "target.num_cached_tokens: 12 of 12" in (error.details() or "")


async def test_what_the_cache_holds_leaves_before_the_rest_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # One token of one layer in a frame, so that nothing waits for company.
    monkeypatch.setattr(sender, "FramePlanner", functools.partial(FramePlanner, frame_bytes=2))
    cached = 2 * BLOCK_SIZE
    async with working() as worker:
        await answered(worker, worker.request())
        worker.sink.writes.clear()
        worker.reservation = worker.book.open(BLOCKS, range(10), 1000, worker.applied.append)
        gate = worker.runner.before_run = Gate()
        call = worker.call(worker.request())
        while len(worker.sink.writes) < cached * GEOMETRY.num_layers:
            await asyncio.sleep(0)
        assert all(tokens.stop <= cached for _, tokens in worker.sink.writes)
        gate.open(9)
        await read_all(call)
        assert worker.sink.content(BLOCKS, range(10)) == worker.source.content([0, 1, 2], range(10))
        assert len(worker.sink.writes) == 10 * GEOMETRY.num_layers
        assert (await worker.runtime.engine.snapshot()).counters.prefill_tokens_computed == 10 + 10 - cached


async def test_cached_tokens_are_counted() -> None:
    async with working() as worker:
        for cached in (0, 2 * BLOCK_SIZE):
            worker.reservation = worker.book.open(BLOCKS, range(10), 1000, worker.applied.append)
            _, finished = await answered(worker, worker.request())
            assert finished.cached_tokens == cached
        await worker.assert_free()


@pytest.mark.parametrize(("output", "stop", "text"), [([], "0>", "<2"), ([71], "71><21", "")])
async def test_a_first_token_that_completes_a_stop_string_abandons_the_transfer(
    output: list[int], stop: str, text: str
) -> None:
    async with working(tokenizer=FakeTokenizer()) as worker:
        worker.reservation.tokens = range(10 + len(output))
        first, finished = await answered(worker, worker.request(output=output, stop=[stop]))
        assert (first.text, first.stop, first.finish_reason) == (text, stop, types.FINISH_REASON_STOP)
        assert not finished.HasField("transfer")
        await worker.assert_free()


async def test_logprobs_of_the_prompt_come_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async with working() as worker:
        run = worker.runner.run

        def telling(batch: Batch) -> StepOutput:
            sampled = [
                SampledToken(token.token_id, TokenLogprobs(token.token_id, -1, 1)) for token in run(batch).sampled
            ]
            [piece] = batch.slices
            following = PROMPT[piece.start + 1 : piece.start + piece.num_tokens + 1]
            return StepOutput(sampled, {piece.request.request_id: [TokenLogprobs(token, -2, 1) for token in following]})

        monkeypatch.setattr(worker.runner, "run", telling)
        call = worker.call(worker.request(logprobs=0, prompt_logprobs=0))
        told, first = (await call.read()).prompt_logprobs, (await call.read()).first_token
        assert [token.token_id for token in told.tokens] == PROMPT[1:]
        assert [token.token_id for token in first.logprobs] == [20]


async def test_logits_that_are_not_numbers_end_the_request_and_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with working() as worker:
        run = worker.runner.run

        def faulty(batch: Batch) -> StepOutput:
            return StepOutput([SampledToken(NOT_A_NUMBER) for _ in run(batch).sampled])

        monkeypatch.setattr(worker.runner, "run", faulty)
        error = await refusal(worker.call(worker.request()))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert worker.applied == []
        await worker.assert_free()
        monkeypatch.setattr(worker.runner, "run", run)
        worker.reservation = worker.book.open(BLOCKS, range(10), 1000, worker.applied.append)
        _, finished = await answered(worker, worker.request())
        assert finished.cached_tokens == 0, "what made such logits is not kept"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"output_token_ids": b"abc"}, "output_token_ids: 3 bytes"),
        ({"output_token_ids": bytes([100, 0, 0, 0])}, "output_token_ids: token id 100 is not below 100"),
        ({"cache_salt": "x" * 129}, "cache_salt: 129 characters"),
    ],
)
async def test_a_malformed_request_is_refused_by_the_field(changes: dict[str, Any], field: str) -> None:
    async with working() as worker:
        request = worker.request()
        request.MergeFrom(pb.PrefillRequest(**changes))
        error = await refusal(worker.call(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")
        await worker.assert_free()
