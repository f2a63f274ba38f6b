"""What is fuzzed: functions of any bytes that raise only when a promise is broken. `run` drives them by coverage."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvbaton.engine.errors import NotFoundError, TransferRejectedError
from kvbaton.handoff.codec import (
    Frame,
    Message,
    RunningDigest,
    WireError,
    decode_message,
    encode_frame,
    encode_message,
)
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import FakeStore, fingerprint, frame_info, header

TOKENS = range(2, 10)
BLOCKS, SOURCE_BLOCKS = [7, 3, 5], [0, 1, 2]
PIECES = [(range(2), range(2, 6)), (range(2, 3), range(2, 6)), (range(3), range(6, 10))]
FIRST_TOKEN = 42


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    """Valid inputs to begin with."""


class Sides:
    """A receiver with one reservation, and the messages that fill it."""

    def __init__(self) -> None:
        self.book, self.applied = TicketBook(), list[int]()
        self.sink, self.source = FakeStore(), FakeStore()
        self.counters = ReceiverCounters()
        self.reservation = self.book.open(BLOCKS, TOKENS, 1000, self.applied.append)
        for layer in range(self.source.geometry.num_layers):
            self.source.fill(layer, SOURCE_BLOCKS, range(12))

    def attempt(self) -> IncomingTransfer:
        return IncomingTransfer(self.book, self.sink, fingerprint(), self.counters)

    def messages(self, attempt: int) -> list[bytes]:
        """Header, three frames and commit."""
        digest, size, encoded = RunningDigest(), 0, []
        for number, (layers, tokens) in enumerate(PIECES):
            payload = b"".join(self.source.read(layers, SOURCE_BLOCKS, tokens))
            info = frame_info(number, layers, tokens, payload, attempt)
            digest.add(info)
            size += len(payload)
            encoded.append(encode_frame(info, [payload]))
        commit = pb.KvCommit(
            first_token_id=FIRST_TOKEN,
            num_frames=len(PIECES),
            payload_bytes=size,
            digest=digest.value(FIRST_TOKEN),
        )
        begin = encode_message(header(self.reservation.ticket, TOKENS, attempt=attempt))
        return [begin, *encoded, encode_message(commit)]

    def check(self) -> None:
        """KV is used once at the most, and only if it is exactly what was sent."""
        assert self.applied in ([], [FIRST_TOKEN]), self.applied
        assert len(self.book) == (not self.applied)
        if self.applied:
            sent = self.source.content(SOURCE_BLOCKS, TOKENS)
            assert self.sink.content(BLOCKS, TOKENS) == sent, "KV that differs was applied"


def codec(data: bytes) -> None:
    """Any bytes are a message that protobuf reads as well, or a WireError."""
    try:
        message = decode_message(data)
    except WireError:
        return
    try:
        request = pb.TransferRequest.FromString(data)
    except DecodeError:
        # There are messages that the codec has no use for yet, and skips as unknown ones.
        assert b"\x22" in data or b"\x1a" in data
        return
    kind = request.WhichOneof("message")
    if isinstance(message, Frame):
        assert kind == "frame"
        assert request.frame.payload == message.payload
        assert request.frame.info == message.info
    else:
        assert kind is not None
        assert getattr(request, kind) == message


def receiver(data: bytes) -> None:
    """Any messages, of any attempts, changed in any way: what is applied is what was sent."""
    sides = Sides()
    number = 1
    transfer, messages = sides.attempt(), sides.messages(number)
    written_after_end = False
    for operation, message in _script(data, messages):
        if operation == NEXT_ATTEMPT:
            number += 1
            transfer, messages[:] = sides.attempt(), sides.messages(number)
            continue
        writes = len(sides.sink.writes)
        try:
            _apply(transfer, decode_message(message))
        except (TransferRejectedError, NotFoundError, WireError):
            transfer = sides.attempt()
        written_after_end |= bool(sides.applied) and len(sides.sink.writes) > writes
    assert not written_after_end
    sides.check()


def _apply(transfer: IncomingTransfer, message: Message) -> None:
    match message:
        case Frame():
            transfer.write(message)
        case pb.KvHeader():
            transfer.begin(message)
        case pb.KvCommit():
            transfer.commit(message)


AS_IT_IS, CHANGED, CUT, NEXT_ATTEMPT, RAW = range(5)


def _script(data: bytes, messages: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Read `data` as a list of operations; `messages` are those of the attempt that is current."""
    stream = io.BytesIO(data)
    while code := stream.read(1):
        operation = code[0] % 5
        if operation == RAW:
            size = int.from_bytes(stream.read(1), "big")
            yield operation, stream.read(size)
            continue
        message = messages[int.from_bytes(stream.read(1), "big") % len(messages)]
        place = int.from_bytes(stream.read(2), "big") % len(message) if operation in (CHANGED, CUT) else 0
        if operation == CHANGED:
            changed = message[place] ^ (int.from_bytes(stream.read(1), "big") or 1)
            message = message[:place] + bytes([changed]) + message[place + 1 :]
        yield operation, message[:place] if operation == CUT else message


def _messages() -> list[bytes]:
    return Sides().messages(1)


def _scripts() -> list[bytes]:
    """A transfer as it should be; a byte changed on the way, and another attempt."""
    whole = b"".join(bytes((AS_IT_IS, index)) for index in range(5))
    begun = bytes((AS_IT_IS, 0, AS_IT_IS, 1))
    struck = [bytes((CHANGED, index, 0, place, 255)) for index in range(5) for place in (1, 5, 20, 60)]
    return [whole, *(begun + strike + bytes((NEXT_ATTEMPT, 0)) + whole for strike in struck)]


TARGETS = {
    "codec": Target(codec, _messages),
    "receiver": Target(receiver, _scripts),
}
