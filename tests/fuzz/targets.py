"""What is fuzzed: functions of any bytes that raise only when a promise is broken. `run` drives them by coverage."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fuzz import connections, links
from fuzz.sides import Sides

from kvbaton.engine.errors import NotFoundError, TransferRejectedError
from kvbaton.handoff.codec import (
    Frame,
    Message,
    WireError,
    decode_message,
    encode_message,
    encode_reference,
)
from kvbaton.handoff.receiver import IncomingTransfer
from kvbaton.v1 import kv_transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    """Valid inputs to begin with."""


def codec(data: bytes) -> None:
    """Any bytes are a message that protobuf reads as well, or a WireError."""
    try:
        message = decode_message(data)
    except WireError:
        return
    request = pb.TransferRequest.FromString(data)
    kind = request.WhichOneof("message")
    if isinstance(message, Frame):
        assert kind == "frame"
        assert request.frame.payload == message.payload
        assert request.frame.info == message.info
        assert (message.reference is not None) == request.frame.HasField("reference")
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
        case pb.KvConfirm():
            transfer.confirm()


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
    return [*Sides().messages(1), encode_message(pb.KvConfirm()), encode_reference(pb.FrameInfo(number=1), [1, 2])]


def _scripts() -> list[bytes]:
    """A transfer as it should be; a byte changed on the way, and another attempt."""
    whole = b"".join(bytes((AS_IT_IS, index)) for index in range(5))
    begun = bytes((AS_IT_IS, 0, AS_IT_IS, 1))
    struck = [bytes((CHANGED, index, 0, place, 255)) for index in range(5) for place in (1, 5, 20, 60)]
    return [whole, *(begun + strike + bytes((NEXT_ATTEMPT, 0)) + whole for strike in struck)]


TARGETS = {
    "codec": Target(codec, _messages),
    "receiver": Target(receiver, _scripts),
    "server": Target(connections.server, connections.client_bytes),
    "link": Target(links.link, links.conversations),
    "client": Target(connections.client, connections.server_bytes),
}
