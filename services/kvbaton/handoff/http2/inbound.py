"""The bytes of a connection, cut into frames as they come. Pure, and bounded whatever comes.

Frames other than DATA are gathered whole, up to a bound. DATA is passed on piece by piece, and can be written straight
to where the stream wants it: `direct` says where, `landed` that it is there.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from kvbaton.handoff.http2.frames import (
    HEADER_BYTES,
    PADDED,
    PREFACE,
    Code,
    ConnectionFault,
    FrameHeader,
    Kind,
    parse_header,
)

MAX_GATHERED_BYTES = 16_384
"""Largest frame other than DATA that is taken: as much as any peer may send unasked."""

_KNOWN = frozenset(Kind)


class DataSink(Protocol):
    """Takes the data of one stream."""

    @property
    def guard(self) -> AbstractContextManager[object]:
        """Entered around a write into what `direct` offers; raises when it must not be written any more."""
        ...

    def feed(self, data: memoryview) -> None:
        """The next bytes."""
        ...

    def direct(self, limit: int) -> list[memoryview]:
        """Where at most `limit` of the next bytes may be written; empty for nowhere."""
        ...

    def landed(self, count: int) -> None:
        """They were."""
        ...

    def refuse(self, error: Exception) -> None:
        """The guard has raised: the stream takes nothing more."""
        ...


class FrameHandler(Protocol):
    """What a connection does with frames. All raise ConnectionFault."""

    def on_frame(self, header: FrameHeader, payload: bytes) -> None:
        """A whole frame of a known kind, other than DATA."""
        ...

    def on_unknown(self, header: FrameHeader) -> None:
        """A frame of a kind that nobody has defined begins; its payload is skipped."""
        ...

    def on_data(self, header: FrameHeader) -> DataSink | None:
        """A DATA frame begins; None skips its content."""
        ...

    def on_data_end(self, header: FrameHeader) -> None:
        """All of its content was passed on."""
        ...


class FrameReader:
    """One connection's incoming bytes."""

    def __init__(self, handler: FrameHandler, max_frame_bytes: int, *, preface: bool) -> None:
        """`preface`: the peer is a client, which says so first."""
        self._handler = handler
        self._max_frame_bytes = max_frame_bytes
        self._preface = PREFACE if preface else b""
        self._gathered = bytearray()
        self._header: FrameHeader | None = None
        self._sink: DataSink | None = None
        self._left = 0
        """Content of the current frame that is still to come."""
        self._padding = 0

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and has not ended."""
        return self._header is not None or bool(self._gathered)

    @property
    def num_left(self) -> int:
        """How much of the current frame's content is still to come."""
        return self._left

    @property
    def guard(self) -> AbstractContextManager[object]:
        """See `DataSink.guard`."""
        return self._sink.guard if self._sink is not None else nullcontext()

    def direct(self) -> list[memoryview]:
        """Where the connection's next bytes may be written; what comes after them goes to `feed`."""
        return self._sink.direct(self._left) if self._sink is not None and self._left else []

    def landed(self, count: int) -> None:
        """`count` bytes were written to what `direct` offered."""
        assert self._sink is not None
        self._left -= count
        self._sink.landed(count)
        self._end_if_complete()

    def refuse(self, error: Exception) -> None:
        """The guard has raised `error`: the rest of the frame is skipped."""
        assert self._sink is not None
        sink, self._sink = self._sink, None
        sink.refuse(error)

    def feed(self, data: memoryview) -> None:
        """The connection's next bytes, any number of them. Raises ConnectionFault."""
        if self._preface:
            data = self._read_preface(data)
        while data:
            header = self._header
            if header is None:
                data = self._read_header(data)
            elif header.kind == Kind.DATA or header.kind not in _KNOWN:
                data = self._pass_on(data)
            else:
                data = self._gather(data, header)

    def _read_preface(self, data: memoryview) -> memoryview:
        count = min(len(self._preface), len(data))
        if data[:count] != self._preface[:count]:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "not HTTP/2, or no client")
        self._preface = self._preface[count:]
        return data[count:]

    def _read_header(self, data: memoryview) -> memoryview:
        if not self._gathered and len(data) >= HEADER_BYTES:
            header, data = parse_header(data[:HEADER_BYTES]), data[HEADER_BYTES:]
        else:
            count = HEADER_BYTES - len(self._gathered)
            self._gathered += data[:count]
            data = data[count:]
            if len(self._gathered) < HEADER_BYTES:
                return data
            header = parse_header(self._gathered)
            self._gathered.clear()
        if header.length > self._max_frame_bytes:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {header.length} bytes")
        self._header, self._left, self._padding = header, header.length, -1
        if header.kind == Kind.DATA:
            self._sink = self._handler.on_data(header)
            if not header.has(PADDED):
                self._padding = 0
            elif header.length == 0:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "padded DATA without the padding's length")
            self._end_if_complete()
        elif header.kind not in _KNOWN:
            self._padding = 0
            self._handler.on_unknown(header)
            self._end_if_complete()
        elif header.length > MAX_GATHERED_BYTES:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"{Kind(header.kind).name} of {header.length} bytes")
        elif header.length == 0:
            self._header = None
            self._handler.on_frame(header, b"")
        return data

    def _gather(self, data: memoryview, header: FrameHeader) -> memoryview:
        count = header.length - len(self._gathered)
        self._gathered += data[:count]
        if len(self._gathered) == header.length:
            payload = bytes(self._gathered)
            self._gathered.clear()
            self._header = None
            self._handler.on_frame(header, payload)
        return data[count:]

    def _pass_on(self, data: memoryview) -> memoryview:
        if self._padding < 0:
            self._padding = data[0]
            self._left -= 1 + self._padding
            if self._left < 0:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "the padding of DATA is longer than the frame")
            data = data[1:]
        content = data[: self._left]
        if content:
            self._left -= len(content)
            if self._sink is not None:
                self._sink.feed(content)
            data = data[len(content) :]
        if self._left == 0:
            skipped = min(self._padding, len(data))
            self._padding -= skipped
            data = data[skipped:]
        self._end_if_complete()
        return data

    def _end_if_complete(self) -> None:
        header = self._header
        if header is None or self._left or self._padding:
            return
        self._header, self._sink = None, None
        if header.kind == Kind.DATA:
            self._handler.on_data_end(header)
