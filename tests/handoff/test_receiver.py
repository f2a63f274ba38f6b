"""A decode worker's memory takes only what was promised to it: every wrong message is refused by name, one attempt at a
time may write, a closed reservation is never written to, and KV is used once.
"""

import asyncio
import threading
from typing import Any

import pytest

from kvbaton.engine.errors import NotFoundError, TransferRejectedError
from kvbaton.handoff import wire
from kvbaton.handoff.codec import Frame, RunningDigest
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import GEOMETRY, PATIENCE, FakeStore, Gate, fingerprint, frame_info, header

BLOCKS = [7, 3, 5]
TOKENS = range(2, 10)
LAYERS = range(GEOMETRY.num_layers)
FIRST_TOKEN = 42


class Receiver:
    """A decode worker's memory with one reservation, and a prefill worker's with the KV for it."""

    def __init__(self) -> None:
        self.book = TicketBook()
        self.store, self.source = FakeStore(), FakeStore()
        self.counters = ReceiverCounters()
        self.applied: list[int] = []
        self.reservation: Reservation = self.book.open(BLOCKS, TOKENS, 1000, self.applied.append)
        for layer in LAYERS:
            self.source.fill(layer, [0, 1, 2], range(10))

    def attempt(self) -> IncomingTransfer:
        return IncomingTransfer(self.book, self.store, fingerprint(), self.counters)

    def begun(self, attempt: int = 1) -> IncomingTransfer:
        transfer = self.attempt()
        assert transfer.begin(header(self.reservation.ticket, TOKENS, attempt=attempt)).transport == "grpc"
        return transfer

    def frames(self, attempt: int = 1) -> list[Frame]:
        """All of the KV in three frames."""
        pieces = [(range(2), range(2, 6)), (range(2, 3), range(2, 6)), (range(3), range(6, 10))]
        return [self.frame(number, *piece, attempt) for number, piece in enumerate(pieces)]

    def frame(self, number: int, layers: range, tokens: range, attempt: int = 1) -> Frame:
        payload = b"".join(self.source.read(layers, [0, 1, 2], tokens))
        return Frame(frame_info(number, layers, tokens, payload, attempt), memoryview(payload))

    @property
    def arrived(self) -> bool:
        return self.store.content(BLOCKS, TOKENS) == self.source.content([0, 1, 2], TOKENS)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def commit(frames: list[Frame], **changes: Any) -> pb.KvCommit:
    digest = RunningDigest()
    for frame in frames:
        digest.add(frame.info)
    values = {
        "first_token_id": FIRST_TOKEN,
        "num_frames": len(frames),
        "payload_bytes": sum(len(frame.payload) for frame in frames),
        **changes,
    }
    return pb.KvCommit(**{"digest": digest.value(values["first_token_id"]), **values})


def test_a_whole_transfer_is_written_counted_and_applied_once(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        assert receiver.applied == []
        transfer.write(frame)
    size = GEOMETRY.token_bytes * len(TOKENS)
    assert transfer.commit(commit(frames)).applied == pb.KvApplied(num_frames=3, payload_bytes=size)
    assert receiver.applied == [FIRST_TOKEN]
    assert receiver.arrived
    assert receiver.counters == ReceiverCounters(kv_bytes_received=size, transfers_applied=1)
    assert len(receiver.book) == 0
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.commit(commit(frames))
    with pytest.raises(NotFoundError):
        receiver.begun(attempt=2)
    assert receiver.applied == [FIRST_TOKEN]


def test_tickets_are_random_and_long(receiver: Receiver) -> None:
    tickets = {receiver.book.open(BLOCKS, TOKENS, 1000, receiver.applied.append).ticket for _ in range(50)}
    assert len(tickets) == 50
    assert {len(ticket) for ticket in tickets} == {16}
    assert len(receiver.book) == 51


@pytest.mark.parametrize("ticket", [bytes(16), b"", b"short"])
def test_an_unknown_ticket_is_not_found(receiver: Receiver, ticket: bytes) -> None:
    with pytest.raises(NotFoundError, match="ticket"):
        receiver.attempt().begin(header(ticket, TOKENS))


def test_a_closed_ticket_is_not_found_and_closing_twice_is_harmless(receiver: Receiver) -> None:
    receiver.book.close(receiver.reservation)
    receiver.book.close(receiver.reservation)
    with pytest.raises(NotFoundError, match="ticket"):
        receiver.begun()


ROUNDED = fingerprint(kv_dtype="bfloat16", rounded_digest="ff")


def geometry(**changes: Any) -> types.KvGeometry:
    changed = header(b"", TOKENS).geometry
    for field, value in changes.items():
        if field == "dtype":
            changed.dtype = value
        else:
            setattr(changed.layer_groups[0], field, value)
    return changed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fingerprint": fingerprint(architecture="Other")}, "fingerprint.architecture: sender has 'Other'"),
        ({"fingerprint": fingerprint(weights_digest="ff")}, "fingerprint.weights_digest: sender has 'ff'"),
        ({"fingerprint": fingerprint(kv_dtype="bfloat16")}, "fingerprint.kv_dtype: sender has 'bfloat16'"),
        ({"fingerprint": None}, "fingerprint.architecture: sender has ''"),
        ({"geometry": geometry(dtype="bfloat16")}, "geometry.dtype: sender has 'bfloat16', receiver 'float32'"),
        ({"geometry": geometry(num_layers=9)}, r"geometry.layer_groups: sender has \[\(9, "),
        ({"geometry": geometry(num_kv_heads=9)}, "geometry.layer_groups"),
        ({"geometry": geometry(k_head_dim=9)}, "geometry.layer_groups"),
        ({"geometry": geometry(v_head_dim=9)}, "geometry.layer_groups"),
        ({"geometry": geometry(window=9)}, "geometry.layer_groups"),
        ({"encoding": "int4"}, r"encoding: sender has 'int4', receiver \['bfloat16', 'float8', 'int8'\]"),
        ({"encoding": "int8", "geometry": geometry(k_head_dim=9)}, "geometry.layer_groups"),
        ({"encoding": "int8", "fingerprint": fingerprint(weights_digest="ff")}, "fingerprint.weights_digest"),
        ({"encoding": "int8", "fingerprint": ROUNDED}, "fingerprint.rounded_digest: sender has 'ff'"),
        ({"geometry": None}, "geometry.dtype: sender has ''"),
        ({"token_start": 0}, r"token range: sender offers range\(0, 10\), receiver needs range\(2, 10\)"),
        ({"token_stop": 11}, "token range"),
        ({"transports": ["cuda_ipc", "smoke"]}, r"transports: sender offers \['cuda_ipc', 'smoke'\]"),
        ({"transports": []}, "transports"),
        ({"attempt": 0}, "attempt: 0 is not above 0"),
    ],
)
def test_a_header_that_differs_is_refused_by_the_field(
    receiver: Receiver, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TransferRejectedError, match=problem):
        receiver.attempt().begin(header(receiver.reservation.ticket, TOKENS, **changes))
    # The reservation is as it was.
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        transfer.write(frame)
    transfer.commit(commit(frames))
    assert receiver.arrived


def test_a_second_header_is_refused(receiver: Receiver) -> None:
    with pytest.raises(TransferRejectedError, match="header: a second one"):
        receiver.begun().begin(header(receiver.reservation.ticket, TOKENS, attempt=2))


def test_frames_and_commits_before_a_header_are_refused(receiver: Receiver) -> None:
    with pytest.raises(TransferRejectedError, match="header: must come first"):
        receiver.attempt().write(receiver.frames()[0])
    with pytest.raises(TransferRejectedError, match="header: must come first"):
        receiver.attempt().commit(commit([]))
    assert receiver.store.writes == []


@pytest.mark.parametrize("stale", [1, 2])
def test_an_attempt_that_is_not_newer_is_refused(receiver: Receiver, stale: int) -> None:
    receiver.begun(attempt=2)
    with pytest.raises(TransferRejectedError, match=f"attempt: {stale} is not above 2"):
        receiver.begun(attempt=stale)


def test_a_newer_attempt_ends_an_older_one(receiver: Receiver) -> None:
    old = receiver.begun(attempt=1)
    old.write(receiver.frames()[0])
    new, frames = receiver.begun(attempt=3), receiver.frames(attempt=3)
    written = len(receiver.store.writes)
    with pytest.raises(TransferRejectedError, match="attempt 1 was replaced by 3"):
        old.write(receiver.frames()[1])
    assert len(receiver.store.writes) == written
    for frame in frames:
        new.write(frame)
    new.commit(commit(frames))
    assert receiver.arrived
    assert receiver.applied == [FIRST_TOKEN]


def test_a_replaced_attempt_cannot_commit(receiver: Receiver) -> None:
    old, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        old.write(frame)
    receiver.begun(attempt=2)
    with pytest.raises(TransferRejectedError, match="attempt 1 was replaced by 2"):
        old.commit(commit(frames))
    assert receiver.applied == []


def changed_frame(frame: Frame, **changes: int) -> Frame:
    info = pb.FrameInfo()
    info.CopyFrom(frame.info)
    for field, value in changes.items():
        setattr(info, field, value)
    return Frame(info, frame.payload)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attempt": 2}, "frame.attempt: 2 within attempt 1"),
        ({"number": 1}, "frame.number: 1 where 0 must come"),
        ({"token_start": 3}, "layer 0 continues at token 2"),
        ({"token_stop": 11}, "frame 0: tokens"),
        ({"layer_stop": 4}, "frame 0: layers"),
        ({"layer_start": 2}, r"frame 0: layers \[2, 2\)"),
        ({"token_stop": 5}, "frame.payload: 512 bytes where 384 must come"),
        ({"crc32c": 1}, "frame.crc32c: frame 0 was damaged"),
    ],
)
def test_a_wrong_frame_is_refused_by_the_field(receiver: Receiver, changes: dict[str, int], problem: str) -> None:
    transfer = receiver.begun()
    with pytest.raises(TransferRejectedError, match=problem):
        transfer.write(changed_frame(receiver.frames()[0], **changes))
    assert receiver.store.writes == []
    assert receiver.counters.kv_bytes_received == 0


def test_any_flipped_bit_is_found(receiver: Receiver) -> None:
    transfer, frame = receiver.begun(), receiver.frames()[0]
    for bit in range(0, len(frame.payload) * 8, 37):
        damaged = bytearray(frame.payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TransferRejectedError, match="crc32c"):
            transfer.write(Frame(frame.info, memoryview(damaged)))
    assert receiver.store.writes == []
    transfer.write(frame)


def test_a_frame_that_repeats_is_refused(receiver: Receiver) -> None:
    transfer, frame = receiver.begun(), receiver.frames()[0]
    transfer.write(frame)
    with pytest.raises(TransferRejectedError, match="frame.number: 0 where 1 must come"):
        transfer.write(frame)
    with pytest.raises(TransferRejectedError, match="layer 0 continues at token 6, the frame begins at 2"):
        transfer.write(changed_frame(frame, number=1))


def test_a_commit_before_everything_has_come_is_refused(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for index, frame in enumerate(frames):
        with pytest.raises(TransferRejectedError, match="commit: not all layers of all tokens"):
            transfer.commit(commit(frames[:index]))
        transfer.write(frame)
    assert receiver.applied == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_frames": 2}, "commit: frames and bytes sent"),
        ({"payload_bytes": 1}, "commit: frames and bytes sent"),
        ({"digest": bytes(16)}, "commit.digest"),
        ({"digest": b""}, "commit.digest"),
    ],
)
def test_a_commit_that_differs_is_refused_and_the_kv_never_used(
    receiver: Receiver, changes: dict[str, Any], problem: str
) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        transfer.write(frame)
    with pytest.raises(TransferRejectedError, match=problem):
        transfer.commit(commit(frames, **changes))
    assert receiver.applied == []
    assert receiver.counters.transfers_applied == 0
    assert len(receiver.book) == 1


def test_nothing_is_written_after_close(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    transfer.write(frames[0])
    receiver.book.close(receiver.reservation)
    before = receiver.store.content(BLOCKS, TOKENS)
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.write(frames[1])
    assert receiver.store.content(BLOCKS, TOKENS) == before


def test_nothing_is_applied_after_close(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        transfer.write(frame)
    receiver.book.close(receiver.reservation)
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.commit(commit(frames))
    assert receiver.applied == []


class WatchedLock:
    """A lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self.contended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.contended.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def test_close_waits_for_the_write_in_progress(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    gate = receiver.store.before_write = Gate()
    lock = WatchedLock()
    receiver.reservation.lock = lock  # type: ignore[assignment]
    writes_when_closed: list[int] = []

    def close() -> None:
        receiver.book.close(receiver.reservation)
        writes_when_closed.append(len(receiver.store.writes))

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(transfer.write, frames[0]))
        await gate.wait_reached()
        group.create_task(asyncio.to_thread(close))
        assert await asyncio.to_thread(lock.contended.wait, PATIENCE), "close did not wait"
        assert writes_when_closed == []
        gate.open()
    assert writes_when_closed == [1]
    with pytest.raises(TransferRejectedError, match="the request has ended"):
        transfer.write(frames[1])
    assert len(receiver.store.writes) == 1


def test_a_first_token_that_the_model_does_not_have_is_refused(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        transfer.write(frame)
    with pytest.raises(TransferRejectedError, match="first_token_id: 1000 is no token"):
        transfer.commit(commit(frames, first_token_id=1000))
    assert receiver.applied == []


def test_a_first_token_exchanged_on_the_way_is_refused(receiver: Receiver) -> None:
    transfer, frames = receiver.begun(), receiver.frames()
    for frame in frames:
        transfer.write(frame)
    exchanged = commit(frames)
    exchanged.first_token_id += 1
    with pytest.raises(TransferRejectedError, match=r"commit\.digest"):
        transfer.commit(exchanged)
    assert receiver.applied == []


def test_a_reason_is_short_whatever_the_sender_says(receiver: Receiver) -> None:
    many = types.KvGeometry(dtype="float32", layer_groups=[types.LayerGroup(num_layers=1)] * 5000)
    long = types.ModelFingerprint(architecture="x" * 100_000)
    for problem in (
        wire.geometry_problem(receiver.store.geometry, many),
        wire.geometry_problem(receiver.store.geometry, types.KvGeometry(dtype="y" * 100_000)),
        wire.fingerprint_problem(types.ModelFingerprint(), long),
    ):
        assert problem is not None
        assert len(problem) < 300
