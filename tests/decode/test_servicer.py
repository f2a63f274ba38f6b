"""A decode worker's RPC: it admits, waits, takes KV, streams from the second token; and however a stream ends, its
ticket is closed and its blocks are free.
"""

from typing import Any

import grpc
import pytest

from kvbaton.engine.errors import NotFoundError
from kvbaton.engine.scheduler import Batch
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from support.decode_worker import FIRST, PROMPT, admitted, refusal, rest, working
from support.fakes import FakeRunner


async def test_a_request_is_admitted_fed_and_decoded() -> None:
    async with working() as worker:
        call = worker.decode()
        answer = await admitted(call)
        assert len(answer.ticket) == 16
        assert (answer.num_cached_tokens, answer.kv_port, answer.kv_endpoint) == (0, 7201, "")
        assert answer.host.boot_id == "boot"
        blocks = worker.book.find(answer.ticket).blocks
        source = await worker.send_kv(answer.ticket)
        assert worker.store.content(blocks, range(5)) == source.content(range(8), range(5))
        tokens, finished = list[int](), None
        for response in await rest(call):
            if response.HasField("tokens"):
                assert response.tokens.first_index == 1 + len(tokens)
                assert finished is None
                tokens += response.tokens.token_ids
                reason = response.tokens.finish_reason
            else:
                finished = response.finished
        # The first token, which the prefill worker has sent, is not repeated.
        assert tokens == [16, 17, 18]
        assert reason == types.FINISH_REASON_LENGTH
        assert finished is not None
        assert finished.decode_seconds > 0
        await worker.assert_free()
        assert (await worker.runtime.engine.snapshot()).requests_finished == 1


async def test_the_endpoint_that_the_worker_was_told_is_passed_on() -> None:
    async with working(kv_endpoint="kv.example:9") as worker:
        call = worker.decode()
        assert (await admitted(call)).kv_endpoint == "kv.example:9"
        call.cancel()


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"stop_token_ids": [FIRST]}])
async def test_a_first_token_that_ends_the_request_leaves_nothing_to_stream(sampling: dict[str, Any]) -> None:
    async with working() as worker:
        call = worker.decode(**sampling)
        await worker.send_kv((await admitted(call)).ticket)
        assert (await call.read()).HasField("finished")
        assert await call.read() is grpc.aio.EOF
        await worker.assert_free()


async def test_a_stop_token_ends_the_stream_and_is_part_of_it() -> None:
    async with working() as worker:
        call = worker.decode(stop_token_ids=[17])
        await worker.send_kv((await admitted(call)).ticket)
        events = [response.tokens for response in await rest(call) if response.HasField("tokens")]
        assert [token for event in events for token in event.token_ids] == [16, 17]
        assert events[-1].finish_reason == types.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("request_", "sampling", "field"),
    [
        (pb.DecodeRequest(prompt_token_ids=b"abcde"), {}, "prompt_token_ids: 5 bytes"),
        (pb.DecodeRequest(), {}, "prompt_token_ids: is empty"),
        (pb.DecodeRequest(prompt_token_ids=pack_token_ids([100])), {}, "prompt_token_ids: token id 100 is not below"),
        (pb.DecodeRequest(prompt_token_ids=bytes(4)), {"seed": None}, "seed: is missing"),
        (pb.DecodeRequest(prompt_token_ids=bytes(4)), {"max_tokens": None}, "max_tokens: is missing"),
        (pb.DecodeRequest(prompt_token_ids=bytes(4)), {"max_tokens": 0}, "max_tokens: 0 is not"),
        (pb.DecodeRequest(prompt_token_ids=bytes(4)), {"temperature": -1}, "temperature: -1"),
        (pb.DecodeRequest(prompt_token_ids=bytes(4)), {"max_tokens": 64}, "exceed the context of 64"),
    ],
)
async def test_a_malformed_request_is_refused_by_the_field(
    request_: pb.DecodeRequest, sampling: dict[str, Any], field: str
) -> None:
    async with working() as worker:
        error = await refusal(worker.call(request_, **sampling))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")
        await worker.assert_free()


async def test_a_full_worker_lets_wait_and_then_refuses() -> None:
    async with working() as worker:
        first, second = worker.decode([5] * 28), None
        await admitted(first)
        second = worker.decode([5] * 8)
        await worker.settled(receiving=1, waiting=1)
        error = await refusal(worker.decode())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 requests are waiting already" in (error.details() or "")
        first.cancel()
        assert (await admitted(second)).wait_seconds > 0
        second.cancel()
        await worker.assert_free()


async def test_a_request_larger_than_the_pool_is_refused_at_once() -> None:
    async with working() as worker:
        error = await refusal(worker.decode([5] * 30))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        problem = "prompt and max_tokens: 33 tokens need 9 KV blocks, the whole pool has 8"
        assert error.details() == problem


async def test_a_cancel_while_waiting_leaves_the_line() -> None:
    async with working() as worker:
        first = worker.decode([5] * 28)
        await admitted(first)
        second = worker.decode([5] * 8)
        await worker.settled(receiving=1, waiting=1)
        second.cancel()
        await worker.settled(receiving=1)
        assert (await worker.runtime.engine.snapshot()).requests_cancelled == 1
        first.cancel()
        await worker.assert_free()


async def test_a_cancel_after_admission_closes_the_ticket_and_frees_the_blocks() -> None:
    async with working() as worker:
        call = worker.decode()
        ticket = (await admitted(call)).ticket
        call.cancel()
        await worker.assert_free()
        with pytest.raises(NotFoundError):
            await worker.send_kv(ticket)
        assert worker.store.writes == []


async def test_a_deadline_while_kv_is_awaited_frees_the_blocks() -> None:
    async with working() as worker:
        request = pb.DecodeRequest(prompt_token_ids=pack_token_ids(PROMPT))
        request.sampling.CopyFrom(types.SamplingParams(max_tokens=4, seed=0))
        call = DecodeServiceStub(worker.channel).Decode(request, timeout=0.2)
        await admitted(call)
        assert (await refusal(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await worker.assert_free()


async def test_a_failing_model_ends_the_stream_without_its_secrets() -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("secret")

    runner = FakeRunner()
    runner.before_run = fail
    async with working(runner) as worker:
        call = worker.decode()
        await worker.send_kv((await admitted(call)).ticket)
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (error.details() or "")
        await worker.assert_free()


async def test_requests_with_the_same_id_run_side_by_side() -> None:
    async with working() as worker:
        first = worker.decode()
        ticket = (await admitted(first)).ticket
        second = worker.decode()
        assert (await admitted(second)).ticket != ticket
        first.cancel()
        second.cancel()
        await worker.assert_free()
