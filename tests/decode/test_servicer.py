"""A decode worker's RPC: it admits, waits, takes KV, streams from the second token; and however a stream ends, its
ticket is closed and its blocks are free.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.decode.servicer import DecodeServicer
from kvbaton.engine.errors import NotFoundError
from kvbaton.engine.scheduler import Batch, Counts, Limits
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, SenderCounters, Target
from kvbaton.handoff.servicer import SERVICE_NAME, KvTransferServicer
from kvbaton.rpc.serving import Registration, channel, serving
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from kvbaton.worker.runtime import WorkerRuntime
from support.fakes import GEOMETRY, PATIENCE, FakeRunner, FakeStore, fingerprint, make_runtime

PROMPT = [5, 6, 7, 8, 9]
FIRST = 50
NUM_BLOCKS = 8
LIMITS = Limits(max_prefill_tokens=0, max_decode_seqs=4, max_waiting=1)


class Worker:
    """A served decode worker with a fake model, and a prefill worker's sender beside it."""

    def __init__(self, runner: FakeRunner) -> None:
        self.store, self.book = FakeStore(), TicketBook()
        self.runtime: WorkerRuntime = make_runtime(self.store, runner, LIMITS, NUM_BLOCKS)
        self.channel: Any = None
        self.address = ""

    def decode(self, prompt: list[int] = PROMPT, **sampling: Any) -> Any:
        return self.call(pb.DecodeRequest(request_id="r", prompt_token_ids=pack_token_ids(prompt)), **sampling)

    def call(self, request: pb.DecodeRequest, **sampling: Any) -> Any:
        values = {"max_tokens": 4, "seed": 0, "ignore_eos": True, **sampling}
        request.sampling.CopyFrom(types.SamplingParams(**{k: v for k, v in values.items() if v is not None}))
        return DecodeServiceStub(self.channel).Decode(request, timeout=PATIENCE)

    async def send_kv(self, ticket: bytes, num_tokens: int = len(PROMPT)) -> FakeStore:
        source, tokens = FakeStore(), range(num_tokens)
        outgoing = OutgoingTransfer(GEOMETRY, tokens)
        for layer in range(GEOMETRY.num_layers):
            source.fill(layer, range(8), tokens)
            outgoing.layer_ready(layer, num_tokens, range(8))
        outgoing.first_token(FIRST)
        sender = KvSender(source, fingerprint(), types.HostIdentity(), SenderCounters())
        target = Target(endpoint=self.address, ticket=ticket, attempt=1, tokens=tokens)
        await sender.send(self.channel, target, outgoing, PATIENCE)
        return source

    async def settled(self, **counts: int) -> None:
        """Wait until exactly these requests are left."""
        while (await self.runtime.engine.snapshot()).counts != Counts(**counts):
            pass

    async def assert_free(self) -> None:
        await self.settled()
        assert (await self.runtime.engine.snapshot()).num_free_blocks == NUM_BLOCKS
        assert len(self.book) == 0


@asynccontextmanager
async def working(runner: FakeRunner | None = None, kv_endpoint: str = "") -> AsyncIterator[Worker]:
    worker = Worker(runner or FakeRunner())
    counters = ReceiverCounters()
    receiver = KvTransferServicer(
        lambda: IncomingTransfer(worker.book, worker.store, fingerprint(), counters), counters
    )
    servicer = DecodeServicer(worker.runtime, worker.book, 7201, kv_endpoint)
    services = [servicer.registration, Registration(SERVICE_NAME, receiver.add_to)]
    async with asyncio.timeout(PATIENCE):
        with worker.runtime.engine:
            async with serving(services, "127.0.0.1", 0, grace_seconds=0) as server:
                worker.address = server.address
                async with channel(server.address) as worker.channel:
                    yield worker


async def admitted(call: Any) -> pb.DecodeAdmitted:
    response = await call.read()
    assert response.HasField("admitted")
    answer: pb.DecodeAdmitted = response.admitted
    return answer


async def rest(call: Any) -> list[pb.DecodeResponse]:
    responses: list[pb.DecodeResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


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
        assert "needs 9 KV blocks, the whole pool has 8" in (error.details() or "")


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
