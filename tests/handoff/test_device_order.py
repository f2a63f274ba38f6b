"""KV that a device copies by itself: applied when it is there, and in order with the engine's work on either side."""

import asyncio
import threading
from typing import Any

from kvbaton.handoff.codec import RunningDigest, encode_frame, encode_message
from kvbaton.handoff.receiver import Applied, IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.handoff.servicer import TransferCall
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import GEOMETRY, PATIENCE, FakeStore, fingerprint, frame_info, header

BLOCKS = [7, 3, 5]
TOKENS = range(2, 10)


class Receiver:
    """A decode worker with one reservation, and all that a sender writes to fill it."""

    def __init__(self, on_applied: Applied) -> None:
        self.store = FakeStore()
        self.fences = self.store.fences
        self.book = TicketBook(self.store.engine_follows_landings)
        self.reservation: Reservation = self.book.open(BLOCKS, TOKENS, 1000, on_applied)
        payload = FakeStore().content([0, 1, 2], TOKENS)
        info, digest = frame_info(0, range(GEOMETRY.num_layers), TOKENS, payload), RunningDigest()
        digest.add(info)
        commit = pb.KvCommit(first_token_id=7, num_frames=1, payload_bytes=len(payload), digest=digest.value(7))
        self.messages = [
            encode_message(header(self.reservation.ticket, TOKENS)),
            encode_frame(info, [payload]),
            encode_message(commit),
        ]

    async def receive(self) -> list[str]:
        """Take all messages; the answers."""
        counters, stream = ReceiverCounters(), Stream()
        answering: Any = stream
        transfer = IncomingTransfer(self.book, self.store, fingerprint(), counters)
        call = TransferCall(transfer, answering, counters)
        for message in self.messages:
            call.on_message(message)
        call.on_half_close()
        async with asyncio.timeout(PATIENCE):
            await stream.over.wait()
        return stream.answers


class Stream:
    """The answering half of a call, as `http2` has it."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.over = asyncio.Event()
        self.ended, self.peer = False, "127.0.0.1:1"

    def send(self, message: bytes) -> None:
        self.answers.append(str(pb.TransferResponse.FromString(message).WhichOneof("message")))

    def end(self, error: BaseException | None = None) -> None:
        assert error is None
        self.ended = True
        self.over.set()


class Copying:
    """A device at work, until a test says that it is done."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        self.asked.set()
        assert self.over.wait(PATIENCE)


async def test_nothing_is_applied_before_a_device_has_copied_it_and_the_loop_goes_on() -> None:
    applied: list[int] = []
    receiver, copying = Receiver(applied.append), Copying()
    receiver.store.still_landing = copying
    async with asyncio.TaskGroup() as group:
        receiving = group.create_task(receiver.receive())
        assert await asyncio.to_thread(copying.asked.wait, PATIENCE)
        assert applied == []
        assert not receiving.done()
        copying.over.set()
    assert receiving.result() == ["ready", "applied"]
    assert applied == [7]


async def test_kv_that_is_applied_comes_before_what_the_engine_does_next() -> None:
    order: list[str] = []
    receiver = Receiver(lambda token: order.extend([*receiver.fences, "applied"]))
    await receiver.receive()
    assert order == ["landings follow", "engine follows", "applied"]


def test_a_request_that_ends_leaves_its_blocks_to_the_engine_after_what_has_landed() -> None:
    receiver = Receiver(lambda token: None)
    transfer = IncomingTransfer(receiver.book, receiver.store, fingerprint(), ReceiverCounters())
    assert receiver.fences == []
    transfer.begin(header(receiver.reservation.ticket, TOKENS))
    assert receiver.fences == ["landings follow"]
    receiver.book.close(receiver.reservation)
    assert receiver.reservation.closed
    assert receiver.fences == ["landings follow", "engine follows"]
