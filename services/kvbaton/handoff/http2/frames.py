"""HTTP/2 frames as bytes, both ways (RFC 9113, sections 4 and 6). Pure: no sockets, no state of a connection."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first."""

HEADER_BYTES = 9
MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65_535
MIN_FRAME_BYTES = 16_384
"""Largest payload that every peer takes."""
MAX_FRAME_BYTES = 2**24 - 1
"""Largest payload that a frame's header can tell."""


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x01, 0x01, 0x04, 0x08, 0x20
"""Flags."""


class Setting(IntEnum):
    """Identifiers of settings."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Code(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that no stream survives: GOAWAY with `code`."""

    def __init__(self, code: Code, problem: str) -> None:
        """`problem` goes into the GOAWAY's debug data and into this side's log."""
        super().__init__(problem)
        self.code = code


class StreamFault(Exception):
    """The peer broke the protocol on one stream: RST_STREAM with `code`."""

    def __init__(self, stream_id: int, code: Code, problem: str) -> None:
        """The connection goes on."""
        super().__init__(problem)
        self.stream_id = stream_id
        self.code = code


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The nine bytes before each payload."""

    length: int
    kind: int
    """A `Kind`, or a number that nobody has defined yet."""
    flags: int
    stream_id: int

    def has(self, flag: int) -> bool:
        """Whether a flag is set."""
        return bool(self.flags & flag)


def pack_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes."""
    return struct.pack(">IBI", length << 8 | kind, flags, stream_id)


def parse_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Inverse of `pack_header`, from exactly nine bytes; the reserved bit is ignored."""
    length_and_kind, flags, stream_id = struct.unpack(">IBI", data)
    return FrameHeader(length_and_kind >> 8, length_and_kind & 0xFF, flags, stream_id & MAX_WINDOW)


def settings_frame(values: Mapping[int, int]) -> bytes:
    """A SETTINGS frame with these values."""
    payload = b"".join(struct.pack(">HI", identifier, value) for identifier, value in values.items())
    return pack_header(len(payload), Kind.SETTINGS, 0, 0) + payload


SETTINGS_ACK = pack_header(0, Kind.SETTINGS, ACK, 0)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """Pairs of identifier and value. Raises ConnectionFault."""
    if len(payload) % 6:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    return list(struct.iter_unpack(">HI", payload))


def ping_frame(opaque: bytes, *, ack: bool = False) -> bytes:
    """A PING with eight opaque bytes, or the answer to one."""
    return pack_header(8, Kind.PING, ACK if ack else 0, 0) + opaque


def goaway_frame(last_stream_id: int, code: int, problem: str) -> bytes:
    """A GOAWAY with at most 200 bytes of explanation."""
    payload = struct.pack(">II", last_stream_id, code) + problem.encode()[:200]
    return pack_header(len(payload), Kind.GOAWAY, 0, 0) + payload


def reset_frame(stream_id: int, code: int) -> bytes:
    """An RST_STREAM."""
    return pack_header(4, Kind.RST_STREAM, 0, stream_id) + struct.pack(">I", code)


def window_frame(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE; stream 0 is the connection."""
    return pack_header(4, Kind.WINDOW_UPDATE, 0, stream_id) + struct.pack(">I", increment)


def parse_uint32(payload: bytes, kind: Kind) -> int:
    """The one number of an RST_STREAM or a WINDOW_UPDATE. Raises ConnectionFault."""
    if len(payload) != 4:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"{kind.name} of {len(payload)} bytes")
    return int.from_bytes(payload)


def header_frames(stream_id: int, block: bytes, max_frame_bytes: int, *, end_stream: bool) -> bytes:
    """A header block as HEADERS and as many CONTINUATIONs as it needs."""
    pieces = [block[at : at + max_frame_bytes] for at in range(0, len(block), max_frame_bytes)] or [b""]
    frames = []
    for index, piece in enumerate(pieces):
        kind = Kind.CONTINUATION if index else Kind.HEADERS
        flags = END_STREAM if end_stream and index == 0 else 0
        if index == len(pieces) - 1:
            flags |= END_HEADERS
        frames.append(pack_header(len(piece), kind, flags, stream_id) + piece)
    return b"".join(frames)


def strip_header_padding(header: FrameHeader, payload: bytes) -> bytes:
    """The fragment of a HEADERS frame without its padding and its (obsolete) priority. Raises ConnectionFault."""
    start = (1 if header.has(PADDED) else 0) + (5 if header.has(PRIORITISED) else 0)
    padding = payload[0] if header.has(PADDED) and payload else 0
    if start + padding > len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "the padding of HEADERS is longer than the frame")
    return payload[start : len(payload) - padding]
