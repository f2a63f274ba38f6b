"""What can happen to a transfer on its way, each at a place that a seed chooses, and how the sender must hear of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from kvbaton.engine.errors import KvbatonError, NotFoundError, TransferRejectedError, UnavailableError
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fault_proxy import Edit, Passed, Passing, Then, unchanged
from support.http2_frames import grpc_message

HUGE = 2**32 - 1
_SILENCE = "gave no answer"
Error = type[KvbatonError] | type[TimeoutError]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break a transfer."""

    make: Callable[[random.Random, int], Edit]
    """From a source of randomness and the number of frames of an undisturbed transfer."""
    error: Error | tuple[Error, ...] = TransferRejectedError
    message: str = "."
    """Found in the error."""
    responses: bool = False
    """Whether it strikes the receiver's answers."""
    applied: bool = False
    """Whether the receiver has applied everything although the sender hears otherwise."""
    silent: bool = False
    """Whether the sender hears nothing, and gives up."""
    frozen: bool = False
    """Whether the connection is of no more use, and nobody knows."""


def varint(value: int) -> bytes:
    """Protobuf's."""
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def field(number: int, content: bytes, length: int | None = None) -> bytes:
    """A length-delimited field, whose length lies where one is given."""
    return varint(number << 3 | 2) + varint(len(content) if length is None else length) + content


def flipped(data: bytes, rng: random.Random) -> bytes:
    """With one bit changed."""
    changed = bytearray(data)
    bit = rng.randrange(len(data) * 8)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def at(kind: str, number: int, change: Callable[[bytes], Passed]) -> Edit:
    """Change one message, and leave the others alone."""

    def edit(message: Passing) -> Passed:
        hit = (message.kind, message.number) == (kind, number)
        return change(message.data) if hit else unchanged(message)

    return edit


def calling(kind: str, number: int, action: Callable[[], object], then: Then = Then.GO_ON) -> Edit:
    """Do something before a message passes, and let it pass a little later."""

    def change(data: bytes) -> Passed:
        action()
        return Passed(grpc_message(data), then, delay=0.02)

    return at(kind, number, change)


def on_frame(change: Callable[[random.Random, bytes], Passed]) -> Callable[[random.Random, int], Edit]:
    """Strikes a random frame."""
    return lambda rng, num_frames: at("frame", rng.randrange(num_frames), lambda data: change(rng, data))


def single(kind: str, change: Callable[[random.Random, bytes], Passed]) -> Callable[[random.Random, int], Edit]:
    """Strikes the first message of a kind."""
    return lambda rng, _: at(kind, 0, lambda data: change(rng, data))


def parsed(change: Callable[[random.Random, pb.TransferRequest], object]) -> Callable[[random.Random, bytes], Passed]:
    """Changes fields, and encodes again."""

    def apply(rng: random.Random, data: bytes) -> Passed:
        request = pb.TransferRequest.FromString(data)
        change(rng, request)
        return Passed(grpc_message(request.SerializeToString()))

    return apply


def _payload_bit(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.payload = flipped(request.frame.payload, rng)


def _info_bit(rng: random.Random, data: bytes) -> Passed:
    frame = pb.TransferRequest.FromString(data).frame
    info = flipped(frame.info.SerializeToString(), rng)
    return Passed(grpc_message(field(2, field(1, info) + field(2, frame.payload))))


def _shift(name: str) -> Callable[[random.Random, pb.TransferRequest], None]:
    def change(rng: random.Random, request: pb.TransferRequest) -> None:
        setattr(request.frame.info, name, rng.choice([getattr(request.frame.info, name) + 1, HUGE]))

    return change


def _length_lies(rng: random.Random, data: bytes) -> Passed:
    frame = pb.TransferRequest.FromString(data).frame
    inner = field(1, frame.info.SerializeToString())
    lies = [
        field(2, inner + field(2, frame.payload, HUGE)),
        field(2, inner + field(2, frame.payload), HUGE),
        field(2, field(1, frame.info.SerializeToString(), HUGE) + field(2, frame.payload)),
        field(2, inner + field(2, frame.payload, len(frame.payload) + 1)),
        field(2, inner + field(2, frame.payload, 2**64 - 1)),
    ]
    return Passed(grpc_message(rng.choice(lies)))


def _payload_longer(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.payload += bytes(rng.randint(1, 5000))


def _payload_shorter(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.payload = request.frame.payload[rng.randint(1, len(request.frame.payload)) :]


def _swapped(rng: random.Random, num_frames: int) -> Edit:
    number, kept = rng.randrange(num_frames - 1), bytearray()

    def edit(message: Passing) -> Passed:
        if message.kind == "frame" and message.number == number:
            kept.extend(grpc_message(message.data))
            return Passed(b"")
        if message.kind == "frame" and message.number == number + 1:
            return Passed(grpc_message(message.data) + kept)
        return unchanged(message)

    return edit


def _first_again(rng: random.Random, num_frames: int) -> Edit:
    """The header comes a second time, before some frame."""
    header = bytearray()

    def edit(message: Passing) -> Passed:
        if message.kind == "header":
            header.extend(grpc_message(message.data))
        again = message.kind == "frame" and message.number == number
        return Passed((bytes(header) if again else b"") + grpc_message(message.data))

    number = rng.randrange(num_frames)
    return edit


def _torn(then: Then) -> Callable[[random.Random, bytes], Passed]:
    """A part of the message passes."""

    def change(rng: random.Random, data: bytes) -> Passed:
        whole = grpc_message(data)
        return Passed(whole[: rng.randrange(1, len(whole))], then)

    return change


def after(then: Then) -> Callable[[random.Random, bytes], Passed]:
    """The message passes, and nothing more as it should."""
    return lambda _, data: Passed(grpc_message(data), then)


def _whole(*parts: bytes, length: int | None = None, compressed: int = 0) -> Callable[[random.Random, bytes], Passed]:
    """Something else in the message's place."""
    return lambda _, data: Passed(grpc_message(b"".join(parts) or data, length=length, compressed=compressed))


def on_header(change: Callable[[pb.KvHeader], object]) -> Callable[[random.Random, int], Edit]:
    """Changes fields of the header."""
    return single("header", parsed(lambda _, request: change(request.header)))


def _groups(header: pb.KvHeader, **changes: int) -> None:
    for group in header.geometry.layer_groups:
        for name, value in changes.items():
            setattr(group, name, value)


def _many_groups(header: pb.KvHeader) -> None:
    header.geometry.layer_groups.extend([types.LayerGroup(num_layers=HUGE, k_head_dim=HUGE)] * 10_000)


def _ticket(rng: random.Random, request: pb.TransferRequest) -> None:
    request.header.ticket = flipped(request.header.ticket, rng)


def _commit(change: Callable[[pb.KvCommit], object]) -> Callable[[random.Random, int], Edit]:
    return single("commit", parsed(lambda _, request: change(request.commit)))


def _set(name: str, change: Callable[[int], int]) -> Callable[[pb.KvCommit], None]:
    return lambda commit: setattr(commit, name, change(getattr(commit, name)))


def _nothing(_: random.Random, __: bytes) -> Passed:
    return Passed(b"")


FAULTS: dict[str, Fault] = {
    "payload: a bit flipped": Fault(on_frame(parsed(_payload_bit)), message="frame.crc32c"),
    "info: a bit flipped": Fault(on_frame(_info_bit)),
    "any bit of a message flipped": Fault(on_frame(lambda rng, data: Passed(grpc_message(flipped(data, rng))))),
    "a frame dropped": Fault(on_frame(_nothing), message=r"frame.number|commit"),
    "a frame repeated": Fault(on_frame(lambda _, data: Passed(grpc_message(data) * 2)), message="frame.number"),
    "two frames swapped": Fault(_swapped, message="frame.number"),
    "attempt changed": Fault(on_frame(parsed(_shift("attempt"))), message="frame.attempt"),
    "number changed": Fault(on_frame(parsed(_shift("number"))), message="frame.number"),
    "layer_start changed": Fault(on_frame(parsed(_shift("layer_start")))),
    "layer_stop changed": Fault(on_frame(parsed(_shift("layer_stop")))),
    "token_start changed": Fault(on_frame(parsed(_shift("token_start")))),
    "token_stop changed": Fault(on_frame(parsed(_shift("token_stop")))),
    "payload longer": Fault(on_frame(parsed(_payload_longer)), message="frame.payload"),
    "payload shorter": Fault(on_frame(parsed(_payload_shorter)), message="frame.payload"),
    "a length that lies": Fault(on_frame(_length_lies), message="malformed|claims"),
    "a message of 4 GiB claimed": Fault(on_frame(_whole(length=HUGE)), UnavailableError),
    "a message said to be compressed": Fault(on_frame(_whole(compressed=1)), UnavailableError),
    "an empty message": Fault(on_frame(lambda *_: Passed(grpc_message(b""))), message="malformed"),
    "noise in a message's place": Fault(on_frame(_whole(b"\xff" * 40)), message="malformed"),
    "a message of two": Fault(on_frame(lambda _, data: Passed(grpc_message(data + data))), message="malformed"),
    "an unknown message": Fault(on_frame(_whole(field(99, b"x" * 99))), message="malformed"),
    "an unasked confirmation": Fault(on_frame(_whole(field(4, b"")))),
    "the header again": Fault(_first_again, message="header"),
    "a commit too early": Fault(on_frame(_whole(field(3, b""))), message="commit"),
    "no header": Fault(single("header", lambda *_: Passed(grpc_message(field(2, b"")))), message="header"),
    "ticket: a bit flipped": Fault(single("header", parsed(_ticket)), NotFoundError, "ticket"),
    "ticket empty": Fault(on_header(lambda header: header.ClearField("ticket")), NotFoundError, "ticket"),
    "ticket of a mebibyte": Fault(on_header(lambda h: setattr(h, "ticket", bytes(1 << 20))), NotFoundError, "ticket"),
    "attempt 0": Fault(on_header(lambda header: setattr(header, "attempt", 0)), message="attempt"),
    "another model": Fault(
        on_header(lambda h: setattr(h.fingerprint, "weights_digest", "beef")), message="weights_digest"
    ),
    "another dtype": Fault(on_header(lambda h: setattr(h.geometry, "dtype", "bfloat16")), message="dtype"),
    "geometry: many layers": Fault(on_header(lambda h: _groups(h, num_layers=HUGE)), message="geometry"),
    "geometry: no heads": Fault(on_header(lambda h: _groups(h, num_kv_heads=0)), message="geometry"),
    "geometry: wide heads": Fault(on_header(lambda h: _groups(h, v_head_dim=HUGE)), message="geometry"),
    "geometry: many groups": Fault(on_header(_many_groups), message="geometry"),
    "geometry: none": Fault(on_header(lambda header: header.ClearField("geometry")), message="geometry"),
    "tokens: more": Fault(on_header(lambda h: setattr(h, "token_stop", HUGE)), message="token range"),
    "tokens: fewer": Fault(on_header(lambda h: setattr(h, "token_start", h.token_start + 1)), message="token range"),
    "no transport": Fault(on_header(lambda header: header.ClearField("transports")), message="transport"),
    "unknown transport": Fault(on_header(lambda h: h.transports.__setitem__(0, "pigeon")), message="transport"),
    "commit: another first token": Fault(_commit(_set("first_token_id", lambda v: v ^ 1)), message="commit.digest"),
    "commit: no token": Fault(_commit(_set("first_token_id", lambda _: HUGE)), message="commit.first_token_id"),
    "commit: fewer frames": Fault(_commit(_set("num_frames", lambda v: v - 1)), message="commit"),
    "commit: more bytes": Fault(_commit(_set("payload_bytes", lambda v: v + 2**32)), message="commit"),
    "commit: no digest": Fault(_commit(lambda commit: commit.ClearField("digest")), message="commit.digest"),
    "no commit": Fault(single("commit", _nothing), UnavailableError, "without an answer"),
    "closed between frames": Fault(on_frame(after(Then.CLOSE)), UnavailableError),
    "reset between frames": Fault(on_frame(after(Then.RESET)), UnavailableError),
    "closed within a frame": Fault(on_frame(_torn(Then.CLOSE)), UnavailableError),
    "reset within a frame": Fault(on_frame(_torn(Then.RESET)), UnavailableError),
    "closed after the header": Fault(single("header", after(Then.CLOSE)), UnavailableError),
    "stalled between frames": Fault(on_frame(after(Then.HOLD)), UnavailableError, _SILENCE, silent=True),
    "stalled within a frame": Fault(on_frame(_torn(Then.HOLD)), UnavailableError, _SILENCE, silent=True),
    "frozen between frames": Fault(on_frame(after(Then.FREEZE)), UnavailableError, _SILENCE, silent=True, frozen=True),
    "frozen within a frame": Fault(on_frame(_torn(Then.FREEZE)), UnavailableError, _SILENCE, silent=True, frozen=True),
    "ready dropped": Fault(single("ready", _nothing), UnavailableError, _SILENCE, silent=True, responses=True),
    "ready is applied": Fault(single("ready", _whole(field(2, b""))), UnavailableError, responses=True),
    "ready is noise": Fault(single("ready", _whole(b"\xff" * 40)), UnavailableError, responses=True),
    "applied dropped": Fault(
        single("applied", _nothing), UnavailableError, "without an answer", responses=True, applied=True
    ),
    "applied is noise": Fault(single("applied", _whole(b"\xff")), UnavailableError, responses=True, applied=True),
    "closed before applied": Fault(
        single("applied", lambda *_: Passed(b"", Then.CLOSE)), UnavailableError, responses=True, applied=True
    ),
}
"""By name, for grpc. None of them may end in KV that differs, or in a stream that hangs."""
