"""gRPC's messages within one direction of a stream: a flag, four bytes of length, the message. Pure.

A message whose first bytes say where it belongs is received there; any other one is gathered whole.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import grpc

PREFIX_BYTES = 5
START_BYTES = 256
"""As much of a message as is looked at before it is decided where the rest goes."""

MAX_BUFFERS = 512
"""Most buffers of one system call, below the kernel's limit of 1024."""


class MessageFault(Exception):
    """A message that cannot be taken: the stream ends, with `code`."""

    code = grpc.StatusCode.INTERNAL


class CompressedError(MessageFault):
    """The compressed flag, though no encoding was agreed on."""

    code = grpc.StatusCode.UNIMPLEMENTED


class TooLargeError(MessageFault):
    """A message, or what is gathered of several, above its bound."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class TruncatedError(MessageFault):
    """The stream ended within a message."""


class StalledError(MessageFault):
    """A message began, and nothing more of it came for too long."""

    code = grpc.StatusCode.UNAVAILABLE


@dataclass(slots=True)
class Placement:
    """Where a message's bytes go as they come."""

    offset: int
    """Bytes of the message before the first part; they were in its start."""
    parts: Sequence[memoryview]
    """Writable bytes, which take the rest of the message, exactly."""
    guard: AbstractContextManager[object]
    """Entered around each single write into the parts; raises when writing is no longer allowed. Used many times."""
    landed: Callable[[memoryview], object] = field(default=lambda _: None)
    """Told of each piece of the parts that has been filled, in order, while it is fresh in the processor's cache."""


class MessageListener(Protocol):
    """Whom a reader asks and tells."""

    def place(self, start: memoryview, size: int) -> Placement | None:
        """Where to receive a message of `size` bytes; None to get it whole."""
        ...

    def on_message(self, message: bytes) -> None:
        """A whole message."""
        ...

    def on_placed(self) -> None:
        """The message that was placed has arrived."""
        ...


class Gathered:
    """Bytes of unfinished messages that are being gathered on one connection, with their bound."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, count: int) -> None:
        """Raises TooLargeError."""
        if count > self._left:
            raise TooLargeError("unfinished messages on this connection take too much memory")
        self._left -= count

    def give_back(self, count: int) -> None:
        """They are done with."""
        self._left += count


class MessageReader:
    """Takes a stream's bytes as they come: by `feed`, or, where `direct` offers a place, by writing there."""

    def __init__(self, listener: MessageListener, max_message_bytes: int, gathered: Gathered) -> None:
        self._listener = listener
        self._limit = max_message_bytes
        self._gathered = gathered
        self._head = bytearray()
        self._size = -1
        self._body: bytearray | None = None
        self._placement: Placement | None = None
        self._parts: list[memoryview] = []
        self._left = 0
        self._dropped = False

    @property
    def partial(self) -> bool:
        """Whether a message has begun and has not ended."""
        return bool(self._head) or self._left > 0

    @property
    def guard(self) -> AbstractContextManager[object]:
        """What to enter around a write into what `direct` offers."""
        assert self._placement is not None
        return self._placement.guard

    def feed(self, data: memoryview) -> None:
        """The stream's next bytes, any number of them. Raises MessageFault, or what the listener raises."""
        while data and not self._dropped:
            if self._left == 0:
                data = self._start(data)
            elif self._placement is not None:
                data = self._copy(data)
            else:
                data = self._gather(data)

    def direct(self, limit: int) -> list[memoryview]:
        """Where the next bytes of the stream may be written, at most `limit` and never past the message."""
        if self._placement is None:
            return []
        if self._left <= limit and len(self._parts) <= MAX_BUFFERS:
            return self._parts
        offered: list[memoryview] = []
        for part in self._parts[:MAX_BUFFERS]:
            offered.append(part[:limit])
            limit -= len(part)
            if limit <= 0:
                break
        return offered

    def landed(self, count: int) -> None:
        """`count` bytes were written to what `direct` offered."""
        placement = self._placement
        assert placement is not None
        self._left -= count
        full = 0
        for part in self._parts:
            if count < len(part):
                break
            placement.landed(part)
            count -= len(part)
            full += 1
        rest = self._parts[full:]
        if count:
            placement.landed(rest[0][:count])
            rest[0] = rest[0][count:]
        self._parts = rest
        if self._left == 0:
            self._placement = None
            self._listener.on_placed()

    def finish(self) -> None:
        """The stream has ended. Raises TruncatedError within a message."""
        if self.partial:
            raise TruncatedError("the stream ended within a message")

    def drop(self) -> None:
        """Nothing more is wanted of the stream."""
        if self._body is not None:
            self._gathered.give_back(len(self._body))
        self._body, self._placement, self._parts, self._left = None, None, [], 0
        self._head.clear()
        self._dropped = True

    def _start(self, data: memoryview) -> memoryview:
        """Gather a message's prefix and first bytes, and decide where the rest goes."""
        head = self._head
        if len(head) < PREFIX_BYTES:
            data = _fill(head, data, PREFIX_BYTES)
            if len(head) < PREFIX_BYTES:
                return data
            self._read_prefix()
        start = min(self._size, START_BYTES)
        data = _fill(head, data, PREFIX_BYTES + start)
        if len(head) < PREFIX_BYTES + start:
            return data
        message = bytes(head[PREFIX_BYTES:])
        head.clear()
        if self._size == start:
            self._listener.on_message(message)
        else:
            self._open(message)
        return data

    def _read_prefix(self) -> None:
        flag, self._size = self._head[0], int.from_bytes(self._head[1:])
        if flag:
            raise CompressedError(f"a message with flag {flag}, though nothing was said of compression")
        if self._size > self._limit:
            raise TooLargeError(f"a message of {self._size} bytes; at most {self._limit} are taken")

    def _open(self, start: bytes) -> None:
        placement = self._listener.place(memoryview(start), self._size)
        if self._dropped:
            return
        if placement is None:
            self._gathered.take(len(start))
            self._body, self._left = bytearray(start), self._size - len(start)
            return
        assert placement.offset + sum(map(len, placement.parts)) == self._size, "a message does not fit its place"
        assert placement.offset <= len(start)
        self._placement, self._parts = placement, [part for part in placement.parts if part]
        self._left = self._size - placement.offset
        rest = memoryview(start)[placement.offset :]
        while rest and self._placement is placement:
            rest = self._copy(rest)

    def _copy(self, data: memoryview) -> memoryview:
        assert self._placement is not None
        part = self._parts[0]
        count = min(len(part), len(data))
        with self._placement.guard:
            part[:count] = data[:count]
        self.landed(count)
        return data[count:]

    def _gather(self, data: memoryview) -> memoryview:
        assert self._body is not None
        piece = data[: self._left]
        self._gathered.take(len(piece))
        self._body += piece
        self._left -= len(piece)
        if self._left == 0:
            message = bytes(self._body)
            self._gathered.give_back(len(message))
            self._body = None
            self._listener.on_message(message)
        return data[len(piece) :]


def _fill(head: bytearray, data: memoryview, size: int) -> memoryview:
    count = size - len(head)
    head += data[:count]
    return data[count:]


class MessageWriter:
    """Cuts one message into pieces as large as flow control allows, without copying it."""

    def __init__(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """The message is the parts' concatenation."""
        self._parts = [memoryview(part) for part in parts if len(part)]
        size = sum(map(len, self._parts))
        self._parts.insert(0, memoryview(b"\0" + size.to_bytes(4)))
        self._size = self.left = size + PREFIX_BYTES

    @property
    def begun(self) -> bool:
        """Whether some of it was taken, and some was not."""
        return 0 < self.left < self._size

    def take(self, size: int) -> list[memoryview]:
        """The next `size` bytes."""
        if size >= self.left:
            taken, self._parts, self.left = self._parts, [], 0
            return taken
        self.left -= size
        taken = []
        while size:
            part = self._parts[0]
            if len(part) > size:
                taken.append(part[:size])
                self._parts[0] = part[size:]
                break
            taken.append(part)
            size -= len(part)
            del self._parts[0]
        return taken
