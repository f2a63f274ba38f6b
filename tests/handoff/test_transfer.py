"""Sender and receiver over a real stream: what arrives is what was computed, whenever it was computed; every refusal
and every loss comes out as the exception that says so; an ended sender ends the stream.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.engine.errors import NotFoundError, TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff import conversation as conversation_module
from kvbaton.handoff import pieces as pieces_module
from kvbaton.handoff import sender as sender_module
from kvbaton.handoff.codec import crc32c, decode_message
from kvbaton.handoff.frames import FRAME_BYTES, FramePlanner
from kvbaton.handoff.http2 import calls as calls_module
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, SenderCounters, Target, TransferReport
from kvbaton.handoff.servicer import SERVICE_NAME, KvTransferServicer
from kvbaton.rpc.serving import Registration, serving
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.connections import PeerConnections
from support.fakes import GEOMETRY, PATIENCE, FakeStore, fingerprint, forever

BLOCKS, SOURCE_BLOCKS = [9, 2, 11, 4], [0, 1, 2, 3]
TOKENS = range(3, 16)
LAYERS = range(GEOMETRY.num_layers)


class Pair:
    """Both ends of the hand-off, connected."""

    def __init__(self) -> None:
        self.book, self.applied = TicketBook(), list[int]()
        self.source, self.sink = FakeStore(), FakeStore()
        self.sent, self.received = SenderCounters(), ReceiverCounters()
        self.fingerprint = fingerprint()
        self.address = ""
        self.peers = PeerConnections()
        self.reservation: Reservation = self.book.open(BLOCKS, TOKENS, 1000, self.applied.append)
        self.outgoing = OutgoingTransfer(GEOMETRY, TOKENS)
        self.begun = asyncio.Event()

    def target(self, **changes: Any) -> Target:
        values = {
            "endpoint": self.address,
            "ticket": self.reservation.ticket,
            "attempt": 1,
            "tokens": TOKENS,
            **changes,
        }
        return Target(**values)

    async def send(self, timeout: float | None = PATIENCE, **changes: Any) -> TransferReport:
        sender = KvSender(self.source, self.fingerprint, types.HostIdentity(boot_id="b"), self.sent)
        async with asyncio.timeout(PATIENCE * 2):
            connection = await self.peers.get(self.address)
            return await sender.send(connection, self.target(**changes), self.outgoing, timeout)

    def compute(self, *chunks: range, first_token: int | None = 77) -> None:
        """A chunked prefill, as the engine's thread does it."""
        for chunk in chunks or (range(16),):
            for layer in LAYERS:
                self.source.fill(layer, SOURCE_BLOCKS, chunk)
                self.outgoing.layer_ready(layer, chunk.stop, SOURCE_BLOCKS)
        if first_token is not None:
            self.outgoing.first_token(first_token)

    @property
    def arrived(self) -> bool:
        return self.sink.content(BLOCKS, TOKENS) == self.source.content(SOURCE_BLOCKS, TOKENS)


@asynccontextmanager
async def listening(pair: Pair, behaviour: Callable[..., Any] | None = None) -> AsyncIterator[None]:
    """Serve `pair`'s receiver, or `behaviour(messages, context)` in its place."""

    class Transfer(IncomingTransfer):
        def begin(self, header: pb.KvHeader) -> pb.KvReady:
            ready = super().begin(header)
            pair.begun.set()
            return ready

    def new_transfer() -> IncomingTransfer:
        return Transfer(pair.book, pair.sink, fingerprint(), pair.received)

    def add(server: grpc.aio.Server) -> None:
        assert behaviour is not None
        handler = grpc.stream_stream_rpc_method_handler(
            behaviour, request_deserializer=decode_message, response_serializer=pb.TransferResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Transfer": handler}),))

    servicer = KvTransferServicer(new_transfer, pair.received)
    async with AsyncExitStack() as stack:
        if behaviour is None:
            pair.address = (await stack.enter_async_context(serving_kv(servicer.methods, "127.0.0.1", 0))).address
        else:
            registration = Registration(SERVICE_NAME, add)
            server = serving([registration], "127.0.0.1", 0, grace_seconds=0)
            pair.address = (await stack.enter_async_context(server)).address
        stack.push_async_callback(pair.peers.close)
        yield


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    async with listening(made):
        yield made


async def test_what_arrives_is_what_was_computed(pair: Pair) -> None:
    pair.compute()
    report = await pair.send()
    size = GEOMETRY.token_bytes * len(TOKENS)
    assert pair.arrived
    assert pair.applied == [77]
    assert (report.payload_bytes, report.frames) == (size, 1)
    assert 0 < report.computed_ns <= report.first_frame_ns <= report.applied_ns
    assert report.overlapped_share == 0
    assert pair.sent == SenderCounters(kv_bytes_sent=size, transfers_applied=1)
    assert pair.received == ReceiverCounters(kv_bytes_received=size, transfers_applied=1)


@pytest.mark.parametrize("frame_bytes", [100, 1000, FRAME_BYTES])
async def test_layers_leave_as_they_are_computed(pair: Pair, monkeypatch: pytest.MonkeyPatch, frame_bytes: int) -> None:
    monkeypatch.setattr(
        sender_module, "FramePlanner", lambda kv, start, stop: FramePlanner(kv, start, stop, frame_bytes)
    )
    pair.outgoing = OutgoingTransfer(GEOMETRY, TOKENS)
    chunks = [range(5), range(5, 6), range(6, 16)]
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(pair.send())
        group.create_task(asyncio.to_thread(pair.compute, *chunks))
    assert pair.arrived
    assert pair.applied == [77]
    assert sending.result().frames == len(pair.sink.writes)
    assert (sending.result().frames == 1) == (frame_bytes == FRAME_BYTES)


async def test_frames_leave_before_the_prompt_is_computed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "FramePlanner", _in_small_frames)
    pair.outgoing = OutgoingTransfer(GEOMETRY, TOKENS)
    written = asyncio.Event()
    pair.sink.before_write = written.set
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        sending = group.create_task(pair.send())
        await asyncio.to_thread(pair.compute, range(8), first_token=None)
        await written.wait()
        assert pair.applied == []
        assert not sending.done()
        await asyncio.to_thread(pair.compute, range(8, 16))
    assert pair.arrived
    assert 0 < sending.result().overlapped_share <= 1


def _in_small_frames(geometry: KvGeometry, start: int, stop: int) -> FramePlanner:
    return FramePlanner(geometry, start, stop, 100)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attempt": 0}, "attempt: 0 is not above 0"),
        ({"tokens": range(16)}, r"token range: sender offers range\(0, 16\)"),
    ],
)
async def test_a_refused_header_comes_out_with_its_reason(pair: Pair, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(TransferRejectedError, match=f"decode worker {pair.address}: {problem}"):
        await pair.send(**changes)
    assert pair.sent.transfers_rejected == pair.received.transfers_rejected == 1
    assert pair.sent.kv_bytes_sent == 0


async def test_another_model_is_refused_and_the_next_attempt_may_come(pair: Pair) -> None:
    pair.fingerprint = fingerprint(weights_digest="beef")
    with pytest.raises(TransferRejectedError, match="weights_digest: sender has 'beef', receiver '00ff'"):
        await pair.send()
    pair.fingerprint = fingerprint()
    pair.compute()
    await pair.send(attempt=2)
    assert pair.arrived


async def test_a_refusal_in_the_middle_comes_out_with_its_reason(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # So many frames that the receiver's refusal of the third meets the sender in the middle of a write.
    monkeypatch.setattr(sender_module, "FramePlanner", _in_small_frames)
    monkeypatch.setattr(calls_module, "YIELD_BYTES", 1)
    pair.outgoing = OutgoingTransfer(GEOMETRY, TOKENS)
    monkeypatch.setattr(pieces_module, "crc32c", lambda parts: 5 if len(pair.sink.writes) >= 2 else crc32c(parts))
    pair.compute()
    with pytest.raises(TransferRejectedError, match="frame.crc32c: frame .* was damaged"):
        await pair.send()
    assert pair.sent.transfers_rejected == pair.received.transfers_rejected == 1
    assert pair.applied == []


async def test_a_wrong_ticket_is_not_found(pair: Pair) -> None:
    with pytest.raises(NotFoundError, match=f"decode worker {pair.address}: the ticket is unknown"):
        await pair.send(ticket=bytes(16))


async def test_a_request_that_ends_meanwhile_refuses_the_rest(pair: Pair) -> None:
    async def send() -> None:
        with pytest.raises(TransferRejectedError, match="the request has ended"):
            await pair.send()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(send())
        await pair.begun.wait()
        pair.book.close(pair.reservation)
        pair.compute()
    assert pair.sink.writes == []


async def test_nobody_listening_is_unavailable() -> None:
    pair = Pair()
    async with listening(pair):
        pass
    with pytest.raises(UnavailableError, match=f"decode worker {pair.address}"):
        await pair.send()


@pytest.mark.parametrize("closed_here", [False, True])
async def test_a_connection_that_ends_while_layers_are_awaited_is_unavailable(closed_here: bool) -> None:
    pair = Pair()

    async def send() -> None:
        with pytest.raises(UnavailableError, match=f"decode worker {pair.address}"):
            await pair.send()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        async with listening(pair):
            if not closed_here:
                pair.peers = PeerConnections()
            sending = group.create_task(send())
            await pair.begun.wait()
        # The server has stopped, and its own connection was closed.
        await sending
    await pair.peers.close()


ANSWERS: dict[str, Callable[..., pb.TransferResponse]] = {
    "ready": lambda: pb.TransferResponse(ready=pb.KvReady(transport="grpc")),
    "applied": lambda: pb.TransferResponse(applied=pb.KvApplied()),
}


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([], "ended the transfer without an answer"),
        (["applied"], "answered applied where ready must come"),
        (["ready"], "ended the transfer without an answer"),
        (["ready", "ready"], "answered ready where applied must come"),
    ],
)
async def test_a_receiver_that_breaks_the_protocol_is_unavailable(answers: list[str], problem: str) -> None:
    async def misbehave(messages: Any, context: Any) -> None:
        for answer in answers:
            await context.write(ANSWERS[answer]())
        if len(answers) == 1 and answers[0] == "ready":
            async for message in messages:
                if isinstance(message, pb.KvCommit):
                    return

    pair = Pair()
    pair.compute()
    async with listening(pair, misbehave):
        with pytest.raises(UnavailableError, match=problem):
            await pair.send()


@pytest.mark.parametrize("answers", [[], ["ready"]])
async def test_a_receiver_that_never_answers_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    async def silent(messages: Any, context: Any) -> None:
        for answer in answers:
            await context.write(ANSWERS[answer]())
        async for _ in messages:
            pass
        await asyncio.Event().wait()

    monkeypatch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.2)
    pair = Pair()
    pair.compute()
    async with listening(pair, silent):
        with pytest.raises(UnavailableError, match="gave no answer"):
            await pair.send()


async def test_a_receiver_that_applies_what_it_has_not_got_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hasty(messages: Any, context: Any) -> None:
        for answer in ("ready", "applied"):
            await context.write(ANSWERS[answer]())
        await forever()

    monkeypatch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.2)
    pair = Pair()
    async with listening(pair, hasty):
        with pytest.raises(UnavailableError, match="answered applied before everything was sent"):
            await pair.send()
    assert pair.sent.transfers_applied == 0


async def test_what_was_applied_is_applied_though_the_stream_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lingering(messages: Any, context: Any) -> None:
        await context.write(ANSWERS["ready"]())
        async for message in messages:
            if isinstance(message, pb.KvCommit):
                await context.write(ANSWERS["applied"]())
        await asyncio.Event().wait()

    monkeypatch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.2)
    pair = Pair()
    pair.compute()
    async with listening(pair, lingering):
        assert (await pair.send()).applied_ns > 0
    assert pair.sent.transfers_applied == 1


async def test_the_requests_timeout_ends_a_transfer_whose_layers_do_not_come(pair: Pair) -> None:
    with pytest.raises(TimeoutError, match=f"decode worker {pair.address}"):
        await pair.send(timeout=0.2)


async def test_the_requests_timeout_ends_a_wait_for_ready() -> None:
    pair = Pair()
    async with listening(pair, forever):
        with pytest.raises(TimeoutError, match=f"decode worker {pair.address}"):
            await pair.send(timeout=0.2)


async def test_the_timeout_ends_a_write_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some frames find room in what the kernels keep, and the rest does not.
    monkeypatch.setattr(sender_module, "FramePlanner", lambda kv, start, stop: FramePlanner(kv, start, stop, 1 << 18))

    async def unread(messages: Any, context: Any) -> None:
        await context.write(ANSWERS["ready"]())
        await asyncio.Event().wait()

    geometry = KvGeometry((LayerGeometry(64, 128, 128),) * 4, "float32")
    pair = Pair()
    pair.source = FakeStore(geometry, num_blocks=64)
    pair.outgoing = OutgoingTransfer(geometry, range(200))
    for layer in range(4):
        pair.outgoing.layer_ready(layer, 200, list(range(64)))
    async with listening(pair, unread):
        with pytest.raises(TimeoutError, match=f"decode worker {pair.address}"):
            await pair.send(timeout=0.5, tokens=range(200))
    assert 0 < pair.sent.kv_bytes_sent < geometry.span_bytes(0, 4, 200)


async def test_a_cancelled_sender_ends_the_stream_at_the_receiver() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def watch(messages: Any, context: Any) -> None:
        context.add_done_callback(lambda _: ended.set())
        await context.write(ANSWERS["ready"]())
        begun.set()
        async for _ in messages:
            pytest.fail("a frame came, though no layer was ready")

    pair = Pair()
    async with asyncio.timeout(PATIENCE), listening(pair, watch):
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(pair.send())
            await begun.wait()
            sending.cancel()
        assert sending.cancelled()
        await ended.wait()


async def test_layers_reported_from_many_threads_wake_the_sender(pair: Pair) -> None:
    start = threading.Barrier(len(LAYERS))

    def compute(layer: int) -> None:
        start.wait(PATIENCE)
        for stop in range(4, 17):
            pair.outgoing.layer_ready(layer, stop, SOURCE_BLOCKS)

    for layer in LAYERS:
        pair.source.fill(layer, SOURCE_BLOCKS, range(16))
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(pair.send())
        for layer in LAYERS:
            group.create_task(asyncio.to_thread(compute, layer))
        pair.outgoing.first_token(5)
    assert pair.arrived
    assert pair.applied == [5]
