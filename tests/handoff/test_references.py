"""A transfer by reference: what it names is copied and checked as a payload is, and counts once it is confirmed."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.handoff import agreement as agreement_module
from kvbaton.handoff.choice import AUTO, GRPC, SHARED_MEMORY
from kvbaton.handoff.codec import Frame, RunningDigest, decode_message, encode_message, encode_reference
from kvbaton.handoff.incoming_links import LinkBook, LinkEndedError
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import GEOMETRY, PATIENCE, FakeStore, Gate, fingerprint, frame_info, header
from support.links import FakeForeignPool, FakeOpener, FakeSharedPool, LinkedStream, Memory, book, offer

BLOCKS = [7, 3, 5]
TOKENS = range(2, 10)
THEIRS = [4, 0, 9]
"""The sender's blocks from token 0 on."""
PIECES = [(range(2), range(2, 6)), (range(2, 3), range(2, 6)), (range(3), range(6, 10))]


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_module, "GRPC_PROBE_BYTES", 5000)


class Ends:
    """A sender's memory with KV, and a linked receiver with one reservation."""

    def __init__(self, setting: str = AUTO) -> None:
        self.memory = Memory(FakeStore(), FakeStore())
        self.pool, self.opener = FakeSharedPool(self.memory), FakeOpener(self.memory)
        self.links: LinkBook = book([self.opener], setting)
        self.book, self.counters, self.applied = TicketBook(), ReceiverCounters(), list[int]()
        self.reservation = self.book.open(BLOCKS, TOKENS, 1000, self.applied.append)
        self.stream: LinkedStream
        self.link_id = b""
        for layer in range(GEOMETRY.num_layers):
            self.memory.source.fill(layer, THEIRS, range(12))

    async def link(self) -> None:
        self.stream = LinkedStream(self.links)
        self.link_id = (await offer([self.pool]).agree(self.stream)).link_id

    @property
    def foreign(self) -> FakeForeignPool:
        return self.opener.opened[-1]

    def attempt(self) -> IncomingTransfer:
        return IncomingTransfer(self.book, self.memory.sink, fingerprint(), self.counters, self.links)

    def header(self, **changes: Any) -> pb.KvHeader:
        values = {"transports": [SHARED_MEMORY], "link_id": self.link_id, **changes}
        return header(self.reservation.ticket, TOKENS, **values)

    def begun(self, **changes: Any) -> IncomingTransfer:
        transfer = self.attempt()
        assert transfer.begin(self.header(**changes)).transport == SHARED_MEMORY
        return transfer

    def frame(self, number: int = 0, blocks: Sequence[int] | None = None, **changes: Any) -> Frame:
        layers, tokens = PIECES[number]
        payload = b"".join(self.memory.source.read(layers, THEIRS, tokens))
        info = frame_info(number, layers, tokens, payload)
        for name, value in changes.items():
            setattr(info, name, value)
        held = THEIRS[tokens.start // 4 : (tokens.stop - 1) // 4 + 1]
        frame = decode_message(encode_reference(info, held if blocks is None else blocks))
        assert isinstance(frame, Frame)
        return frame

    def copied(self) -> IncomingTransfer:
        """A transfer that waits for its confirmation."""
        transfer = self.begun()
        frames = [self.frame(number) for number in range(3)]
        for frame in frames:
            transfer.write(frame)
        assert transfer.commit(commit(frames)) == pb.TransferResponse(copied=pb.KvCopied(num_frames=3))
        return transfer

    @property
    def arrived(self) -> bool:
        return self.memory.sink.content(BLOCKS, TOKENS) == self.memory.source.content(THEIRS, TOKENS)


def commit(frames: list[Frame]) -> pb.KvCommit:
    digest = RunningDigest()
    for frame in frames:
        digest.add(frame.info)
    size = GEOMETRY.token_bytes * len(TOKENS)
    return pb.KvCommit(first_token_id=42, num_frames=len(frames), payload_bytes=size, digest=digest.value(42))


@pytest.fixture
async def ends() -> Ends:
    ends = Ends()
    await ends.link()
    return ends


async def test_what_is_copied_is_applied_once_it_is_confirmed(ends: Ends) -> None:
    transfer = ends.copied()
    assert ends.arrived
    assert ends.applied == []
    size = GEOMETRY.token_bytes * len(TOKENS)
    assert transfer.confirm().applied == pb.KvApplied(num_frames=3, payload_bytes=size)
    assert ends.applied == [42]
    assert ends.counters == ReceiverCounters(kv_bytes_received=size, transfers_applied=1)
    assert len(ends.book) == 0
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.confirm()
    assert ends.applied == [42]


async def test_what_is_never_confirmed_is_never_applied(ends: Ends) -> None:
    transfer = ends.copied()
    ends.book.close(ends.reservation)
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.confirm()
    assert ends.applied == []


async def test_a_confirmation_of_a_replaced_attempt_is_refused(ends: Ends) -> None:
    transfer = ends.copied()
    ends.begun(attempt=2)
    with pytest.raises(TransferRejectedError, match="attempt 1 was replaced by 2"):
        transfer.confirm()
    assert ends.applied == []


async def test_nothing_but_the_confirmation_follows_a_commit(ends: Ends) -> None:
    transfer = ends.copied()
    with pytest.raises(TransferRejectedError, match="nothing but its confirmation"):
        transfer.write(ends.frame())
    with pytest.raises(TransferRejectedError, match="nothing but its confirmation"):
        transfer.commit(commit([]))


async def test_a_confirmation_of_nothing_is_refused(ends: Ends) -> None:
    for transfer in (ends.attempt(), ends.begun()):
        with pytest.raises(TransferRejectedError, match="confirm: nothing was copied"):
            transfer.confirm()


async def test_a_payload_needs_no_confirmation_and_takes_none(ends: Ends) -> None:
    transfer = ends.attempt()
    transfer.begin(ends.header(transports=[GRPC], link_id=b""))
    frames = []
    for number, (layers, tokens) in enumerate(PIECES):
        payload = b"".join(ends.memory.source.read(layers, THEIRS, tokens))
        frames.append(Frame(frame_info(number, layers, tokens, payload), memoryview(payload)))
        transfer.write(frames[-1])
    assert transfer.commit(commit(frames)).HasField("applied")
    with pytest.raises(TransferRejectedError, match="confirm: nothing was copied"):
        transfer.confirm()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"link_id": b""}, "link_id"),
        ({"link_id": bytes(16)}, "link_id"),
    ],
)
async def test_an_unknown_link_does_not_use_the_attempt_up(ends: Ends, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(LinkEndedError, match=problem):
        ends.attempt().begin(ends.header(**changes))
    ends.stream.end()
    with pytest.raises(LinkEndedError, match=problem):
        ends.begun()
    await ends.link()
    ends.begun()


async def test_a_transport_that_the_receiver_does_not_have_is_no_matter_of_links() -> None:
    ends = Ends(GRPC)
    with pytest.raises(TransferRejectedError, match=r"sender offers \['shared_memory'\], receiver has \['grpc'\]"):
        ends.attempt().begin(ends.header())
    ends = Ends(SHARED_MEMORY)
    with pytest.raises(TransferRejectedError, match=r"sender offers \['grpc'\], receiver has \['shared_memory'\]"):
        ends.attempt().begin(ends.header(transports=[GRPC]))


@pytest.mark.parametrize(
    ("blocks", "changes", "problem"),
    [
        ([4], {}, "1 blocks where 2 must come"),
        ([4, 0, 9], {}, "3 blocks where 2 must come"),
        ([], {}, "0 blocks where 2 must come"),
        ([0, 4], {}, "frame 0 was damaged"),
        (None, {"crc32c": 1}, "frame 0 was damaged"),
        (None, {"number": 1}, "frame.number"),
        (None, {"attempt": 2}, "frame.attempt"),
        (None, {"layer_stop": 9}, "layers"),
        (None, {"token_stop": 12}, "tokens"),
    ],
)
async def test_a_wrong_reference_is_refused_by_name(
    ends: Ends, blocks: list[int] | None, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TransferRejectedError, match=problem):
        ends.begun().write(ends.frame(blocks=blocks, **changes))


async def test_a_payload_where_a_reference_must_come_is_refused_and_the_other_way_round(ends: Ends) -> None:
    good = ends.frame()
    with pytest.raises(TransferRejectedError, match="a reference must come"):
        ends.begun().write(Frame(good.info, memoryview(b"payload")))
    with pytest.raises(TransferRejectedError, match="a reference must come"):
        ends.begun(attempt=2).write(Frame(ends.frame(attempt=2).info, memoryview(b"payload"), good.reference))
    transfer = ends.attempt()
    transfer.begin(ends.header(transports=[GRPC], attempt=3))
    good.info.attempt = 3
    with pytest.raises(TransferRejectedError, match="frame.reference: without a link"):
        transfer.write(good)


async def test_blocks_that_are_no_whole_numbers_are_refused(ends: Ends) -> None:
    frame = Frame(ends.frame().info, memoryview(b""), pb.KvReference(blocks=b"12345"))
    with pytest.raises(TransferRejectedError, match=r"frame.reference.blocks: 5 bytes"):
        ends.begun().write(frame)


async def test_where_a_device_copies_there_is_no_checksum(ends: Ends) -> None:
    ends.foreign.checksums = False
    transfer = ends.begun()
    frames = [ends.frame(number, crc32c=0) for number in range(3)]
    for frame in frames:
        transfer.write(frame)
    transfer.commit(commit(frames))
    transfer.confirm()
    assert ends.arrived


async def test_nothing_is_copied_when_the_link_or_the_request_has_ended(ends: Ends) -> None:
    transfer = ends.begun()
    transfer.write(ends.frame(0))
    ends.stream.end()
    with pytest.raises(TransferRejectedError, match="the link to the sender's memory has ended") as caught:
        transfer.write(ends.frame(1))
    assert not isinstance(caught.value, LinkEndedError), "the attempt is used up"
    await ends.link()
    transfer = ends.begun(attempt=2)
    ends.book.close(ends.reservation)
    ends.memory.sink.writes.clear()
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.write(ends.frame(0, attempt=2))
    assert ends.memory.sink.writes == []


async def test_closing_a_reservation_or_a_link_waits_for_a_copy(ends: Ends) -> None:
    gate = ends.foreign.before_copy = Gate()
    transfer = ends.begun()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(transfer.write, ends.frame(0)))
        await gate.wait_reached()
        group.create_task(asyncio.to_thread(ends.book.close, ends.reservation))
        group.create_task(asyncio.to_thread(ends.stream.link.close))
        while len(ends.book) or len(ends.links):
            await asyncio.sleep(0.001)
        assert not ends.reservation.closed
        assert not ends.foreign.closed
        gate.open()
    assert ends.reservation.closed
    assert ends.foreign.closed


def test_confirmations_go_there_and_back() -> None:
    assert decode_message(encode_message(pb.KvConfirm())) == pb.KvConfirm()


def test_the_generated_classes_read_our_references() -> None:
    info = frame_info(3, range(2), range(4), b"x")
    request = pb.TransferRequest.FromString(encode_reference(info, [1, 2**32 - 1]))
    assert request.frame.info == info
    assert request.frame.reference.blocks == b"\x01\0\0\0\xff\xff\xff\xff"
