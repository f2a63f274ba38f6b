"""As much of HTTP/2 (RFC 9113) and of gRPC's framing as it takes to stand between two peers, or to be a bad one."""

import asyncio
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITISED = 0x4, 0x8, 0x20
SETTINGS_INITIAL_WINDOW_SIZE = 0x4
INITIAL_WINDOW, MAX_FRAME = 65_535, 16_384
"""What holds until a peer's SETTINGS say otherwise."""


@dataclass(frozen=True, slots=True)
class Http2Frame:
    """One frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    def encoded(self) -> bytes:
        """Wire bytes."""
        head = len(self.payload).to_bytes(3, "big") + bytes((self.kind, self.flags))
        return head + struct.pack(">I", self.stream) + self.payload

    @property
    def content(self) -> bytes:
        """The payload without padding."""
        return self.payload[1 : len(self.payload) - self.payload[0]] if self.flags & PADDED else self.payload

    @property
    def fragment(self) -> bytes:
        """Of HEADERS: what is left without priority and padding."""
        return self.content[5:] if self.flags & PRIORITISED else self.content


async def read_frame(reader: asyncio.StreamReader) -> Http2Frame:
    """The next frame. Raises IncompleteReadError at the end, ConnectionError when it was torn."""
    head = await reader.readexactly(9)
    (stream,) = struct.unpack(">I", head[5:])
    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
    return Http2Frame(head[3], head[4], stream & 0x7FFFFFFF, payload)


def window_update(stream: int, size: int) -> bytes:
    """Leave to send `size` bytes more; stream 0 is the connection."""
    return Http2Frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size)).encoded()


def settings(*pairs: tuple[int, int]) -> bytes:
    """SETTINGS with these (identifier, value)."""
    return Http2Frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs)).encoded()


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Inverse of the above."""
    for at in range(0, len(payload) - 5, 6):
        identifier, value = struct.unpack(">HI", payload[at : at + 6])
        yield identifier, value


def grpc_message(data: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    """A message with gRPC's prefix, which lies where `length` is given."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


class MessageAssembler:
    """gRPC messages out of a stream's DATA frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that `data` completes, without their prefixes."""
        self._pending += data
        while len(self._pending) >= 5:
            end = 5 + int.from_bytes(self._pending[1:5], "big")
            if len(self._pending) < end:
                return
            message = bytes(self._pending[5:end])
            del self._pending[:end]
            yield message
