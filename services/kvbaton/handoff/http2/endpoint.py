"""One end of an HTTP/2 connection: its streams, and what it sends (RFC 9113). No sockets, no clock.

What the peer sends is `rules.FrameRules`'s to judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvbaton.handoff.http2 import frames as h2
from kvbaton.handoff.http2.frames import Code, Kind, Setting
from kvbaton.handoff.http2.headers import MAX_HEADER_BYTES, HeaderCodec, Headers, NewHeaders
from kvbaton.handoff.http2.messages import Gathered
from kvbaton.handoff.http2.streams import MAX_PENDING_BYTES, Stream, StreamEvents
from kvbaton.handoff.http2.windows import ReceiveWindow, SendWindow

MAX_GATHERED_BYTES = 64 << 20
"""Bytes of unfinished messages on one connection that have no place of their own."""

Accept = Callable[[Stream, Headers], StreamEvents]
"""Gives a new stream the listener for its headers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this end announces."""

    max_message_bytes: int
    stream_window: int = h2.MAX_WINDOW
    """Bytes of a stream that may be on their way; for a server, which takes them as they come, all there can be."""
    max_streams: int = 1024


class Endpoint:
    """State of one end. A server's has an `accept`; a client's opens streams itself."""

    def __init__(self, limits: Limits, accept: Accept | None, on_settled: Callable[[], object] = lambda: None) -> None:
        """`on_settled` is called when the peer's settings have come."""
        self.limits = limits
        self.accept = accept
        self.on_settled = on_settled
        self.codec = HeaderCodec()
        self.out = bytearray()
        """Frames that are to be sent before anything else."""
        self.streams: dict[int, Stream] = {}
        self.send_window = SendWindow()
        self.max_frame_bytes = h2.MIN_FRAME_BYTES
        """Largest frame that the peer takes."""
        self.max_streams = 100
        """Most streams that the peer lets us have; RFC 9113 wants at least this many until it says."""
        self.settled = False
        """The peer's settings have come."""
        self.going_away = False
        """The peer takes no new streams."""
        self.peer_stream_window = h2.DEFAULT_WINDOW
        """What new streams may send before the peer says more."""
        self.receive_window = ReceiveWindow(h2.MAX_WINDOW, h2.MAX_WINDOW)
        self.newest_id = -1 if accept is None else 0
        """Of the streams that were opened, by whoever opens them here."""
        self._gathered = Gathered(MAX_GATHERED_BYTES)
        self._greet()

    def _greet(self) -> None:
        settings: dict[int, int] = {
            Setting.INITIAL_WINDOW_SIZE: self.limits.stream_window,
            Setting.MAX_FRAME_SIZE: h2.MAX_FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
        }
        if self.accept is None:
            self.out += h2.PREFACE
            settings[Setting.ENABLE_PUSH] = 0
        else:
            settings[Setting.MAX_CONCURRENT_STREAMS] = self.limits.max_streams
        self.out += h2.settings_frame(settings) + h2.window_frame(0, h2.MAX_WINDOW - h2.DEFAULT_WINDOW)

    def open(self, headers: NewHeaders) -> Stream:
        """A client's new stream, its headers on their way. The caller gives it a listener at once."""
        self.newest_id += 2
        stream = self.new_stream(self.newest_id)
        self.send_headers(stream, headers)
        return stream

    def listen(self, stream: Stream, events: StreamEvents) -> None:
        """Give a stream its listener."""
        stream.listen(events, self.limits.max_message_bytes, self._gathered)

    def send_headers(self, stream: Stream, headers: NewHeaders) -> None:
        """Headers that are not the last."""
        stream.headers_sent = True
        self.out += h2.header_frames(stream.id, self.codec.encode(headers), self.max_frame_bytes, end_stream=False)

    def send_soon(self, stream: Stream, message: bytes) -> bool:
        """A small message, framed for gRPC already, as soon as the windows let it; False when too much waits."""
        if len(stream.pending) + len(message) > MAX_PENDING_BYTES:
            return False
        stream.pending += message
        self._send_pending(stream)
        return True

    def end(self, stream: Stream, headers: NewHeaders) -> None:
        """Trailers, once everything before them is sent. Nothing more of the stream is taken."""
        stream.drop()
        # Encoded only when they are sent: HPACK counts on the order.
        stream.trailers = headers
        self._send_pending(stream)

    def reset(self, stream: Stream, code: Code) -> None:
        """End a stream at once. Its listener is not told."""
        stream.drop()
        if self.streams.pop(stream.id, None) is not None:
            self.out += h2.reset_frame(stream.id, code)

    def release(self, stream: Stream, count: int) -> None:
        """`count` bytes of a stream's data are done with: its peer may send as many more."""
        increment = stream.receive_window.release(count)
        if increment and not stream.remote_done and stream.id in self.streams:
            self.out += h2.window_frame(stream.id, increment)

    def close_local(self, stream: Stream) -> None:
        """A frame with END_STREAM has been written."""
        stream.local_done = True
        self.forget_if_done(stream)

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.out += h2.ping_frame(b"kvbaton!")

    def go_away(self, code: Code, problem: str) -> None:
        """Say that this connection ends, and why."""
        newest = self.newest_id if self.accept is not None else 0
        self.out += h2.goaway_frame(max(0, newest), code, problem)

    def tick(self) -> None:
        """A second has passed."""
        for stream in list(self.streams.values()):
            if not stream.tick():
                self.reset(stream, Code.CANCEL)

    def lose_all(self, reason: str) -> None:
        """The connection has ended, and so have its streams."""
        while self.streams:
            _, stream = self.streams.popitem()
            stream.drop()
            stream.events.on_reset(Code.CANCEL, reason)

    def on_window(self, stream: Stream) -> None:
        """More of a stream may be sent."""
        self._send_pending(stream)
        if stream.id in self.streams:
            stream.events.on_window()

    def credit(self, stream: Stream) -> int:
        """How much of a stream's data may be sent now in one frame; 0 or less for none."""
        return min(stream.send_window.value, self.send_window.value, self.max_frame_bytes)

    def new_stream(self, stream_id: int) -> Stream:
        """Bookkeeping for a stream that somebody opens. It needs a listener before anything comes for it."""
        window = self.limits.stream_window
        stream = Stream(stream_id, SendWindow(self.peer_stream_window), ReceiveWindow(window, window))
        self.streams[stream_id] = stream
        return stream

    def _send_pending(self, stream: Stream) -> None:
        while stream.pending and (size := min(len(stream.pending), self.credit(stream))) > 0:
            self.out += h2.pack_header(size, Kind.DATA, 0, stream.id) + stream.pending[:size]
            del stream.pending[:size]
            stream.send_window.take(size)
            self.send_window.take(size)
        if stream.trailers is None or stream.pending or stream.local_done:
            return
        block = self.codec.encode(stream.trailers)
        self.out += h2.header_frames(stream.id, block, self.max_frame_bytes, end_stream=True)
        stream.local_done = True
        if not stream.remote_done and self.accept is not None:
            # All was said: the client need not go on (RFC 9113, section 8.1).
            self.reset(stream, Code.NO_ERROR)
        self.forget_if_done(stream)

    def forget_if_done(self, stream: Stream) -> None:
        """A stream that both sides have ended is no more."""
        if stream.local_done and stream.remote_done:
            self.streams.pop(stream.id, None)
