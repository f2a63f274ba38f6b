"""A served prefill worker with a fake model, and a decode worker's memory to deliver to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.engine.counters import Counts
from kvbaton.engine.scheduler import Limits
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.handoff.codec import decode_message
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.peers import PeerConnections
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.handoff.sender import KvSender, SenderCounters, TransferReport
from kvbaton.handoff.servicer import SERVICE_NAME, KvTransferServicer
from kvbaton.prefill.servicer import OutgoingTransfers, PrefillServicer
from kvbaton.rpc.serving import Registration, channel, serving
from kvbaton.v1 import kv_transfer_pb2
from kvbaton.v1 import prefill_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub
from kvbaton.worker.loop_thread import LoopThread
from kvbaton.worker.runtime import WorkerRuntime
from support.fakes import PATIENCE, FakeRunner, FakeStore, fingerprint, make_runtime

PROMPT = list(range(5, 15))
BLOCKS = [9, 2, 11]
NUM_BLOCKS = 8


class WatchedSender(KvSender):
    num_running = 0

    async def send(self, *args: Any) -> TransferReport:
        self.num_running += 1
        try:
            return await super().send(*args)
        finally:
            self.num_running -= 1


class Worker:
    """The worker, the memory, and what to ask."""

    def __init__(self, tokenizer: Any) -> None:
        self.transfers, self.sent = OutgoingTransfers(), SenderCounters()
        self.source, self.sink = FakeStore(), FakeStore()
        self.runner = FakeRunner(self.source, self.transfers.layer_done)
        limits = Limits(max_prefill_tokens=4, max_decode_seqs=0, max_waiting=4)
        self.runtime: WorkerRuntime = make_runtime(self.source, self.runner, limits, NUM_BLOCKS, tokenizer)
        self.book, self.applied = TicketBook(), list[int]()
        self.reservation: Reservation = self.book.open(BLOCKS, range(10), 1000, self.applied.append)
        self.sender = WatchedSender(self.source, fingerprint(), types.HostIdentity(), self.sent)
        self.servicer: PrefillServicer
        self.kv_address = ""
        self.channel: Any = None

    def request(
        self, target: dict[str, Any] | None = None, output: Sequence[int] = (), **sampling: Any
    ) -> pb.PrefillRequest:
        values = {"max_tokens": 4, "seed": 0, "ignore_eos": True, **sampling}
        aim = {"endpoint": self.kv_address, "ticket": self.reservation.ticket, "attempt": 1, **(target or {})}
        return pb.PrefillRequest(
            request_id="r",
            prompt_token_ids=pack_token_ids(PROMPT),
            output_token_ids=pack_token_ids(output),
            sampling=types.SamplingParams(**{k: v for k, v in values.items() if v is not None}),
            target=pb.TransferTarget(**aim),
        )

    def call(self, request: pb.PrefillRequest) -> Any:
        return PrefillServiceStub(self.channel).Prefill(request, timeout=PATIENCE)

    async def assert_free(self) -> None:
        while (await self.runtime.engine.snapshot()).counts != Counts():
            pass
        assert (await self.runtime.engine.snapshot()).num_free_blocks == NUM_BLOCKS
        assert self.transfers._transfers == {}


@asynccontextmanager
async def working(receive: Callable[..., Any] | None = None, tokenizer: Any = None) -> AsyncIterator[Worker]:
    """A worker and a receiver, which is `receive(messages, context)` where that is given."""
    worker, counters = Worker(tokenizer), ReceiverCounters()
    receiver = KvTransferServicer(lambda: IncomingTransfer(worker.book, worker.sink, fingerprint(), counters), counters)
    async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
        if receive is None:
            worker.kv_address = (await stack.enter_async_context(serving_kv(receiver.methods, "127.0.0.1", 0))).address
        else:
            kv_service = Registration(SERVICE_NAME, _adder(receive))
            kv_server = await stack.enter_async_context(serving([kv_service], "127.0.0.1", 0, grace_seconds=0))
            worker.kv_address = kv_server.address
        kv_thread = await stack.enter_async_context(LoopThread("kv", asyncio.new_event_loop))
        peers = PeerConnections()
        stack.push_async_callback(lambda: kv_thread.call(peers.close()))
        stack.enter_context(worker.runtime.engine)
        worker.servicer = PrefillServicer(worker.runtime, worker.transfers, worker.sender, peers, kv_thread)
        services = [worker.servicer.registration]
        server = await stack.enter_async_context(serving(services, "127.0.0.1", 0, grace_seconds=0))
        worker.channel = await stack.enter_async_context(channel(server.address))
        yield worker


def _adder(receive: Callable[..., Any]) -> Callable[[grpc.aio.Server], None]:
    handler = grpc.stream_stream_rpc_method_handler(
        receive,
        request_deserializer=decode_message,
        response_serializer=kv_transfer_pb2.TransferResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(SERVICE_NAME, {"Transfer": handler})
    return lambda server: server.add_generic_rpc_handlers((generic,))


async def read_all(call: Any) -> None:
    """To the end."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error that it ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return caught.value
