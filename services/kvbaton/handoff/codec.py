"""KV frames as protobuf wire bytes, written and read without the protobuf runtime touching the payload.

A frame is an ordinary `TransferRequest`; any protobuf library reads it. The runtime would copy the payload into a
field and then into a message; here it is joined once, straight from the parts, and read in place. Everything but the
payload is still encoded and parsed by the generated classes. The wire format is protobuf's
(protobuf.dev/programming-guides/encoding).
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from crc32c import crc32c as extend_crc32c

from kvbaton.engine.kv_store import Buffer
from kvbaton.v1 import kv_transfer_pb2 as pb

_LENGTH_DELIMITED = 2
_VARINT, _FIXED64, _FIXED32 = 0, 1, 5
_MAX_FIELD = (1 << 29) - 1

_HEADER_FIELD = pb.TransferRequest.HEADER_FIELD_NUMBER
_FRAME_FIELD = pb.TransferRequest.FRAME_FIELD_NUMBER
_COMMIT_FIELD = pb.TransferRequest.COMMIT_FIELD_NUMBER
_INFO_FIELD = pb.KvFrame.INFO_FIELD_NUMBER
_PAYLOAD_FIELD = pb.KvFrame.PAYLOAD_FIELD_NUMBER
_REFERENCE_FIELD = pb.KvFrame.REFERENCE_FIELD_NUMBER
_CONFIRM_FIELD = pb.TransferRequest.CONFIRM_FIELD_NUMBER


_M = TypeVar("_M", pb.KvHeader, pb.KvCommit, pb.KvConfirm, pb.FrameInfo, pb.KvReference)


class WireError(ValueError):
    """Bytes that are no `TransferRequest`."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame; `payload` is a view of the message's own bytes."""

    info: pb.FrameInfo
    payload: memoryview
    reference: pb.KvReference | None = None
    """Where the payload lies in the sender's memory, instead of it."""


Message = pb.KvHeader | Frame | pb.KvCommit | pb.KvConfirm
"""What a sender writes."""


def crc32c(parts: Sequence[Buffer]) -> int:
    """CRC32C of the parts' concatenation, by a library that uses the processor's instruction."""
    value = 0
    for part in parts:
        value = extend_crc32c(part, value)
    return value


@dataclass(frozen=True, slots=True)
class FrameStart:
    """What stands before a payload that a message ends with."""

    info: pb.FrameInfo
    offset: int
    """Bytes before the payload."""
    payload_bytes: int


def encode_frame_start(info: pb.FrameInfo, payload_bytes: int) -> bytes:
    """Wire bytes of `TransferRequest{frame: KvFrame{info, payload}}` up to the payload, which follows."""
    info_bytes = info.SerializeToString()
    frame_start = b"".join(
        (
            _tag(_INFO_FIELD),
            _varint(len(info_bytes)),
            info_bytes,
            _tag(_PAYLOAD_FIELD),
            _varint(payload_bytes),
        )
    )
    return _tag(_FRAME_FIELD) + _varint(len(frame_start) + payload_bytes) + frame_start


def encode_frame(info: pb.FrameInfo, parts: Sequence[Buffer]) -> bytes:
    """The whole of such a message. Copies the payload."""
    return b"".join((encode_frame_start(info, sum(len(part) for part in parts)), *parts))


def decode_frame_start(start: memoryview, size: int) -> FrameStart | None:
    """Inverse of `encode_frame_start`, from the first bytes of a message of `size` bytes.

    None for anything else that a message may be: in another encoding, too, fields may come in any order.
    """
    try:
        key, position = _read_varint(start, 0)
        length, position = _read_varint(start, position)
        if key != _FRAME_FIELD << 3 | _LENGTH_DELIMITED or length != size - position:
            return None
        key, position = _read_varint(start, position)
        length, position = _read_varint(start, position)
        if key != _INFO_FIELD << 3 | _LENGTH_DELIMITED or length > len(start) - position:
            return None
        info = _parse(pb.FrameInfo(), start[position : position + length])
        key, position = _read_varint(start, position + length)
        length, position = _read_varint(start, position)
        if key != _PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED or length != size - position:
            return None
    except WireError:
        return None
    return FrameStart(info, position, length)


def encode_reference(info: pb.FrameInfo, blocks: Sequence[int]) -> bytes:
    """Wire bytes of a frame that names the sender's `blocks`, the first of which holds its first token."""
    reference = pb.KvReference(blocks=struct.pack(f"<{len(blocks)}I", *blocks))
    return pb.TransferRequest(frame=pb.KvFrame(info=info, reference=reference)).SerializeToString()


def referenced_blocks(reference: pb.KvReference) -> tuple[int, ...]:
    """The blocks that a frame names. Raises WireError when their bytes are not whole."""
    if len(reference.blocks) % 4:
        raise WireError(f"reference.blocks: {len(reference.blocks)} bytes are not whole uint32 numbers")
    return struct.unpack(f"<{len(reference.blocks) // 4}I", reference.blocks)


def encode_message(message: pb.KvHeader | pb.KvCommit | pb.KvConfirm) -> bytes:
    """Wire bytes of a `TransferRequest` with a message that has no payload."""
    if isinstance(message, pb.KvHeader):
        return pb.TransferRequest(header=message).SerializeToString()
    if isinstance(message, pb.KvConfirm):
        return pb.TransferRequest(confirm=message).SerializeToString()
    return pb.TransferRequest(commit=message).SerializeToString()


def decode_message(data: bytes) -> Message:
    """Inverse of both encoders, for any valid encoding: fields in any order, unknown ones skipped.

    Raises WireError when the bytes are malformed or hold none, or several, of the messages.
    """
    found: list[Message] = []
    for field, value in _fields(memoryview(data)):
        if field == _FRAME_FIELD:
            found.append(_decode_frame(value))
        elif field == _HEADER_FIELD:
            found.append(_parse(pb.KvHeader(), value))
        elif field == _COMMIT_FIELD:
            found.append(_parse(pb.KvCommit(), value))
        elif field == _CONFIRM_FIELD:
            found.append(_parse(pb.KvConfirm(), value))
    if len(found) != 1:
        raise WireError(f"a transfer request holds one message, not {len(found)}")
    return found[0]


class RunningDigest:
    """The digest that a commit carries: over what identifies each frame, its checksum included, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, info: pb.FrameInfo) -> None:
        """Take in the next frame."""
        self._hash.update(
            struct.pack(
                "<6I",
                info.number,
                info.layer_start,
                info.layer_stop,
                info.token_start,
                info.token_stop,
                info.crc32c,
            )
        )

    def value(self, first_token_id: int) -> bytes:
        """16 bytes over all frames so far and the token that the commit carries. Changes nothing."""
        whole = self._hash.copy()
        whole.update(struct.pack("<I", first_token_id))
        return whole.digest()


def _decode_frame(data: memoryview) -> Frame:
    info, payload = pb.FrameInfo(), memoryview(b"")
    reference: pb.KvReference | None = None
    for field, value in _fields(data):
        if field == _INFO_FIELD:
            info = _parse(info, value)
        elif field == _PAYLOAD_FIELD:
            payload = value
        elif field == _REFERENCE_FIELD:
            reference = _parse(reference or pb.KvReference(), value)
    return Frame(info, payload, reference)


def _parse(message: _M, data: memoryview) -> _M:
    try:
        message.MergeFromString(bytes(data))
    except Exception as error:
        # protobuf's DecodeError class differs between its implementations.
        raise WireError(f"{type(message).__name__} cannot be parsed") from error
    return message


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message, as (number, content); other wire types are skipped."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        field, wire_type = key >> 3, key & 7
        if not 0 < field <= _MAX_FIELD:
            raise WireError(f"field number {field}")
        if wire_type == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            if length > len(data) - position:
                raise WireError(f"field {field} claims {length} bytes, {len(data) - position} are left")
            yield field, data[position : position + length]
            position += length
        elif wire_type == _VARINT:
            _, position = _read_varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise WireError(f"wire type {wire_type}")
    if position != len(data):
        raise WireError("the message ends within a field")


def _tag(field: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise WireError("the message ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError("a number of more than ten bytes")
