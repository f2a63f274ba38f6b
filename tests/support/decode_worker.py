"""A served decode worker with a fake model, and a prefill worker's sender beside it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.decode.servicer import DecodeServicer
from kvbaton.engine.counters import Counts
from kvbaton.engine.scheduler import Limits
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, SenderCounters, Target
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.rpc.serving import channel, serving
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from kvbaton.worker.runtime import WorkerRuntime
from support.fakes import GEOMETRY, PATIENCE, FakeRunner, FakeStore, fingerprint, make_runtime

PROMPT = [5, 6, 7, 8, 9]
FIRST = 50
NUM_BLOCKS = 8
LIMITS = Limits(max_prefill_tokens=0, max_decode_seqs=4, max_waiting=1)
UNIFIED = Limits(max_prefill_tokens=4, max_decode_seqs=4, max_waiting=4)


class Worker:
    """The worker, and what to ask it."""

    def __init__(self, runner: FakeRunner, limits: Limits, tokenizer: Any) -> None:
        self.store, self.book = FakeStore(), TicketBook()
        self.runtime: WorkerRuntime = make_runtime(self.store, runner, limits, NUM_BLOCKS, tokenizer)
        self.channel: Any = None
        self.address = ""

    def decode(self, prompt: list[int] = PROMPT, output: Sequence[int] = (), **sampling: Any) -> Any:
        request = pb.DecodeRequest(prompt_token_ids=pack_token_ids(prompt), output_token_ids=pack_token_ids(output))
        return self.call(request, **sampling)

    def locally(self, prompt: list[int] = PROMPT, output: Sequence[int] = (), **sampling: Any) -> Any:
        request = pb.DecodeRequest(
            prompt_token_ids=pack_token_ids(prompt), output_token_ids=pack_token_ids(output), prefill_locally=True
        )
        return self.call(request, **sampling)

    def call(self, request: pb.DecodeRequest, **sampling: Any) -> Any:
        values = {"max_tokens": 4, "seed": 0, "ignore_eos": True, **sampling}
        request.sampling.CopyFrom(types.SamplingParams(**{k: v for k, v in values.items() if v is not None}))
        return DecodeServiceStub(self.channel).Decode(request, timeout=PATIENCE)

    async def send_kv(self, ticket: bytes, tokens: range = range(len(PROMPT))) -> FakeStore:
        source = FakeStore()
        outgoing = OutgoingTransfer(GEOMETRY, tokens)
        for layer in range(GEOMETRY.num_layers):
            source.fill(layer, range(8), tokens)
            outgoing.layer_ready(layer, tokens.stop, range(8))
        outgoing.first_token(FIRST)
        sender = KvSender(source, fingerprint(), types.HostIdentity(), SenderCounters())
        target = Target(endpoint=self.address, ticket=ticket, attempt=1, tokens=tokens)
        async with await Connection.open(self.address, PATIENCE) as connection:
            await sender.send(connection, target, outgoing, PATIENCE)
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
async def working(
    runner: FakeRunner | None = None, kv_endpoint: str = "", limits: Limits = LIMITS, tokenizer: Any = None
) -> AsyncIterator[Worker]:
    """A worker, served until the block ends."""
    worker = Worker(runner or FakeRunner(), limits, tokenizer)
    counters = ReceiverCounters()
    receiver = KvTransferServicer(
        lambda: IncomingTransfer(worker.book, worker.store, fingerprint(), counters), counters
    )
    servicer = DecodeServicer(worker.runtime, worker.book, 7201, kv_endpoint)
    async with asyncio.timeout(PATIENCE), serving_kv(receiver.methods, "127.0.0.1", 0) as kv_server:
        worker.address = kv_server.address
        with worker.runtime.engine:
            serve = serving([servicer.registration], "127.0.0.1", 0, grace_seconds=0)
            async with serve as server, channel(server.address) as worker.channel:
                yield worker


async def admitted(call: Any) -> pb.DecodeAdmitted:
    """The first event."""
    response = await call.read()
    assert response.HasField("admitted")
    answer: pb.DecodeAdmitted = response.admitted
    return answer


async def rest(call: Any) -> list[pb.DecodeResponse]:
    """All further events."""
    responses: list[pb.DecodeResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error instead of the next event."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value
