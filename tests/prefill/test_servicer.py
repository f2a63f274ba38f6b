"""A prefill worker's RPC: it computes, hands the KV over and samples one token; every failure of the hand-off is the
RPC's, and however the stream ends, sending has ended before the blocks are free.
"""

import asyncio
from typing import Any

import grpc
import pytest

from kvbaton.engine.scheduler import Batch
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.v1 import kv_transfer_pb2
from kvbaton.v1 import prefill_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub
from kvbaton.worker.engine_thread import RequestHandle
from support.fakes import GEOMETRY, PATIENCE, Gate
from support.prefill_worker import BLOCKS, refusal, working


async def test_a_prompt_is_computed_in_chunks_handed_over_and_continued() -> None:
    async with working() as worker:
        gate = worker.runner.before_run = Gate(permits=2)
        call = worker.call(worker.request())
        for _ in range(3):
            await gate.wait_reached()
        gate.open()
        first, finished = await call.read(), await call.read()
        assert await call.read() is grpc.aio.EOF
        assert list(first.first_token.token_ids) == [20]
        assert first.first_token.first_index == 0
        assert first.first_token.finish_reason == types.FINISH_REASON_UNSPECIFIED
        assert worker.applied == [20]
        # Blocks are handed out from 0 up.
        assert worker.sink.content(BLOCKS, range(10)) == worker.source.content([0, 1, 2], range(10))
        transfer = finished.finished.transfer
        assert transfer.transport == "grpc"
        assert transfer.payload_bytes == GEOMETRY.token_bytes * 10 == worker.sent.kv_bytes_sent
        assert transfer.frames == len(worker.sink.writes)
        assert finished.finished.compute_seconds > 0
        await worker.assert_free()


async def test_only_what_the_receiver_lacks_is_sent() -> None:
    async with working() as worker:
        worker.reservation.tokens = range(7, 10)
        call = worker.call(worker.request({"num_cached_tokens": 7}))
        await call.read()
        finished = (await call.read()).finished
        assert finished.transfer.payload_bytes == GEOMETRY.token_bytes * 3
        assert worker.sink.content(BLOCKS, range(7, 10)) == worker.source.content([0, 1, 2], range(7, 10))


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"max_tokens": 1}, types.FINISH_REASON_LENGTH),
        ({"stop_token_ids": [20]}, types.FINISH_REASON_STOP),
    ],
)
async def test_a_first_token_that_ends_the_request_abandons_the_transfer(
    sampling: dict[str, Any], reason: types.FinishReason
) -> None:
    async with working() as worker:
        call = worker.call(worker.request(**sampling))
        assert (await call.read()).first_token.finish_reason == reason
        assert not (await call.read()).finished.HasField("transfer")
        assert await call.read() is grpc.aio.EOF
        await worker.assert_free()
        assert (await worker.runtime.engine.snapshot()).requests_finished == 1


class SlowContext:
    """A router that is slow to take the first token, while the decode worker has heard already that it was the last."""

    def __init__(self, until: asyncio.Event) -> None:
        self.until = until
        self.responses: list[pb.PrefillResponse] = []

    def time_remaining(self) -> float:
        return PATIENCE

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    async def write(self, response: pb.PrefillResponse) -> None:
        await self.until.wait()
        self.responses.append(response)


async def test_a_transfer_refused_because_the_request_has_ended_is_no_failure() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def refuse(messages: Any, context: Any) -> None:
        context.add_done_callback(lambda _: ended.set())
        await context.write(kv_transfer_pb2.TransferResponse(ready=kv_transfer_pb2.KvReady(transport="grpc")))
        begun.set()
        async for message in messages:
            if isinstance(message, kv_transfer_pb2.KvCommit):
                rejected = kv_transfer_pb2.KvRejected(reason="the request has ended")
                await context.write(kv_transfer_pb2.TransferResponse(rejected=rejected))
                return

    async with working(refuse) as worker:
        gate = worker.runner.before_run = Gate()
        context: Any = SlowContext(ended)
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.servicer.Prefill(worker.request(max_tokens=1), context))
            await begun.wait()
            gate.open(3)
        first, finished = context.responses
        assert first.first_token.finish_reason == types.FINISH_REASON_LENGTH
        assert not finished.finished.HasField("transfer")
        await worker.assert_free()


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ({"ticket": b"short"}, "target.ticket: 5 bytes are not 16"),
        ({"ticket": b""}, "target.ticket"),
        ({"endpoint": ""}, "target.endpoint"),
        ({"endpoint": "nowhere"}, "target.endpoint"),
        ({"endpoint": "host:port"}, "target.endpoint"),
        ({"attempt": 0}, "target.attempt: 0 is not 1 or more"),
        ({"num_cached_tokens": 10}, "target.num_cached_tokens: 10 of 10"),
    ],
)
async def test_a_malformed_target_is_refused_by_the_field(target: dict[str, Any], field: str) -> None:
    async with working() as worker:
        error = await refusal(worker.call(worker.request(target)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")
        await worker.assert_free()


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"seed": None}, "seed: is missing"),
        ({"max_tokens": None}, "max_tokens: is missing"),
        ({"top_p": 0}, "top_p: 0"),
        ({"top_k": 0}, "top_k: 0"),
        ({"max_tokens": 60}, "exceed the context of 64"),
    ],
)
async def test_malformed_sampling_is_refused_by_the_field(sampling: dict[str, Any], field: str) -> None:
    async with working() as worker:
        error = await refusal(worker.call(worker.request(**sampling)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")
        await worker.assert_free()


async def test_token_bytes_that_are_not_whole_are_refused() -> None:
    async with working() as worker:
        request = worker.request()
        request.prompt_token_ids += b"x"
        error = await refusal(worker.call(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "prompt_token_ids: 41 bytes" in (error.details() or "")


@pytest.mark.parametrize(
    ("target", "code", "details"),
    [
        ({"ticket": bytes(16)}, grpc.StatusCode.NOT_FOUND, "the ticket is unknown"),
        ({"num_cached_tokens": 1}, grpc.StatusCode.ABORTED, "token range"),
        ({"endpoint": "127.0.0.1:1"}, grpc.StatusCode.UNAVAILABLE, "decode worker 127.0.0.1:1"),
    ],
)
async def test_a_transfer_that_fails_ends_the_rpc_and_frees_the_blocks(
    target: dict[str, Any], code: grpc.StatusCode, details: str
) -> None:
    async with working() as worker:
        error = await refusal(worker.call(worker.request(target)))
        assert error.code() is code
        assert details in (error.details() or "")
        await worker.assert_free()


async def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    async with working() as worker:
        request = worker.request()
        request.prompt_token_ids = pack_token_ids([5] * 40)
        error = await refusal(worker.call(request))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "prompt: 40 tokens need 10 KV blocks, the whole pool has 8"
        await worker.assert_free()


async def test_a_cancel_in_the_middle_of_a_prompt_stops_the_transfer_and_frees_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def watch(messages: Any, context: Any) -> None:
        context.add_done_callback(lambda _: ended.set())
        await context.write(kv_transfer_pb2.TransferResponse(ready=kv_transfer_pb2.KvReady(transport="grpc")))
        begun.set()
        await asyncio.Event().wait()

    async with working(watch) as worker:
        gate = worker.runner.before_run = Gate(permits=1)
        call = worker.call(worker.request())
        await begun.wait()
        for _ in range(2):
            await gate.wait_reached()
        removed = asyncio.Event()
        remove = worker.runtime.engine.remove

        def watched(handle: RequestHandle, *, finished: bool) -> None:
            assert worker.sender.num_running == 0, "the blocks were given back while they were being sent"
            remove(handle, finished=finished)
            removed.set()

        monkeypatch.setattr(worker.runtime.engine, "remove", watched)
        call.cancel()
        await removed.wait()
        await ended.wait()
        gate.open()
        await worker.assert_free()
        after = await worker.runtime.engine.snapshot()
        assert after.requests_cancelled == 1
        assert after.counters.prefill_tokens_computed == 8, "the third chunk was computed for nobody"


async def test_a_failing_model_ends_the_rpc_and_the_transfer() -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("secret")

    async with working() as worker:
        worker.runner.before_run = fail
        error = await refusal(worker.call(worker.request()))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (error.details() or "")
        assert worker.applied == []
        await worker.assert_free()


async def test_a_peer_is_connected_before_a_request_needs_it() -> None:
    async with working() as worker:
        stub = PrefillServiceStub(worker.channel)
        answer = await stub.ConnectPeer(pb.ConnectPeerRequest(endpoint=worker.kv_address), timeout=PATIENCE)
        assert (answer.link.endpoint, answer.link.transport) == (worker.kv_address, "grpc")


async def test_a_peer_without_an_address_is_refused() -> None:
    async with working() as worker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PrefillServiceStub(worker.channel).ConnectPeer(pb.ConnectPeerRequest(endpoint="x"), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (caught.value.details() or "").startswith("endpoint: ")
