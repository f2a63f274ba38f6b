"""One stream's side of a connection: its windows, its message being received, what waits to be sent. Pure."""

from contextlib import AbstractContextManager
from typing import Protocol

from kvbaton.handoff.http2.frames import Code
from kvbaton.handoff.http2.headers import Headers, NewHeaders
from kvbaton.handoff.http2.messages import Gathered, MessageListener, MessageReader, StalledError
from kvbaton.handoff.http2.windows import ReceiveWindow, SendWindow

STALL_TICKS = 10
"""Seconds that a message which has begun may go without a byte."""

MAX_PENDING_BYTES = 1 << 20
"""Most bytes of answers that wait for a peer's window."""


class StreamEvents(MessageListener, Protocol):
    """What a stream tells the call that it carries."""

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        """Headers, or trailers where `ended`."""
        ...

    def on_bytes(self, count: int) -> None:
        """`count` bytes of the peer's window were used by what came; they are to be released."""
        ...

    def on_half_close(self) -> None:
        """The peer sends no more messages."""
        ...

    def on_window(self) -> None:
        """More may be sent."""
        ...

    def on_failure(self, error: Exception) -> None:
        """What arrives cannot be taken: a `MessageFault`, or what this listener has raised. Must not raise."""
        ...

    def on_reset(self, code: Code, reason: str) -> None:
        """The stream has ended without trailers: reset by the peer or for its faults, or lost with the connection."""
        ...


class Stream:
    """Bookkeeping of one stream. Implements `DataSink`; what its listener raises goes no further."""

    def __init__(self, stream_id: int, send_window: SendWindow, receive_window: ReceiveWindow) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        self.events: StreamEvents
        self.headers_sent = False
        self.headers_received = False
        self.local_done = False
        """We have sent END_STREAM."""
        self.remote_done = False
        """The peer has."""
        self.pending = bytearray()
        """Bytes of small messages that wait for the window."""
        self.trailers: NewHeaders | None = None
        """What ends the stream once `pending` is sent."""
        self._reader: MessageReader
        self._quiet = 0

    def listen(self, events: StreamEvents, max_message_bytes: int, gathered: Gathered) -> None:
        """Tell `events` from now on."""
        self.events = events
        self._reader = MessageReader(events, max_message_bytes, gathered)

    @property
    def guard(self) -> AbstractContextManager[object]:
        """See `DataSink`."""
        return self._reader.guard

    def feed(self, data: memoryview) -> None:
        """See `DataSink`."""
        self._quiet = 0
        try:
            self._reader.feed(data)
        except Exception as error:
            self.refuse(error)

    def direct(self, limit: int) -> list[memoryview]:
        """See `DataSink`."""
        return self._reader.direct(limit)

    def landed(self, count: int) -> None:
        """See `DataSink`."""
        self._quiet = 0
        try:
            self._reader.landed(count)
        except Exception as error:
            self.refuse(error)

    def refuse(self, error: Exception) -> None:
        """Take nothing more, because of `error`."""
        self.drop()
        self.events.on_failure(error)

    def drop(self) -> None:
        """Take nothing more."""
        self._reader.drop()

    def end_of_data(self) -> None:
        """The peer has sent END_STREAM with its data."""
        self.remote_done = True
        try:
            self._reader.finish()
            self.events.on_half_close()
        except Exception as error:
            self.refuse(error)

    def tick(self) -> bool:
        """A second has passed; False when the stream is stuck and its peer is to be told no more."""
        if self._reader.partial:
            self._quiet += 1
            if self._quiet > STALL_TICKS:
                self.refuse(StalledError(f"a message began, and nothing more of it came for {STALL_TICKS} s"))
        elif self.trailers is not None:
            self._quiet += 1
            return self._quiet <= STALL_TICKS
        return True
