"""What a peer's frames mean, and which of them end a stream or the connection (RFC 9113, sections 5 and 6).

What comes may be anything. It ends in `ConnectionFault`, in a stream's reset, or is ignored where the RFC says so; it
never takes more memory than the bounds below.
"""

from collections.abc import Callable

from kvbaton.handoff.http2 import frames as h2
from kvbaton.handoff.http2.endpoint import Endpoint
from kvbaton.handoff.http2.frames import Code, ConnectionFault, FrameHeader, Kind, StreamFault
from kvbaton.handoff.http2.headers import MAX_HEADER_BYTES
from kvbaton.handoff.http2.inbound import FrameReader
from kvbaton.handoff.http2.settings import apply_setting
from kvbaton.handoff.http2.streams import Stream
from kvbaton.handoff.http2.windows import WindowOverflowError

MAX_CONTINUATIONS = 16
"""Most frames that one header block may be cut into."""

MAX_IDLE_FRAMES = 1000
"""Most frames a second that move nothing: pings, settings, priorities, resets, empty ones, unknown ones."""


class FrameRules:
    """Acts on an endpoint as its peer's frames demand. Implements `FrameHandler`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.reader = FrameReader(self, h2.MAX_FRAME_BYTES, preface=endpoint.accept is not None)
        """Takes the connection's bytes."""
        self._block: _HeaderBlock | None = None
        self._idle_frames = 0
        self._actions: dict[int, Callable[[FrameHeader, bytes], None]] = {
            Kind.HEADERS: self._on_headers,
            Kind.PRIORITY: self._on_priority,
            Kind.RST_STREAM: self._on_reset,
            Kind.SETTINGS: self._on_settings,
            Kind.PUSH_PROMISE: self._on_push,
            Kind.PING: self._on_ping,
            Kind.GOAWAY: self._on_goaway,
            Kind.WINDOW_UPDATE: self._on_window,
            Kind.CONTINUATION: self._on_continuation,
        }

    def tick(self) -> None:
        """A second has passed."""
        self._idle_frames = 0
        self._endpoint.tick()

    def on_frame(self, header: FrameHeader, payload: bytes) -> None:
        """See `FrameHandler`."""
        self._check_order(header)
        try:
            self._actions[header.kind](header, payload)
        except StreamFault as fault:
            self._fail(fault)

    def on_unknown(self, header: FrameHeader) -> None:
        """See `FrameHandler`."""
        self._check_order(header)
        self._count_idle()

    def on_data(self, header: FrameHeader) -> Stream | None:
        """See `FrameHandler`."""
        self._check_order(header)
        endpoint = self._endpoint
        try:
            endpoint.receive_window.take(header.length)
        except WindowOverflowError as error:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, str(error)) from error
        increment = endpoint.receive_window.release(header.length)
        if increment:
            endpoint.out += h2.window_frame(0, increment)
        if header.length == 0 and not header.has(h2.END_STREAM):
            self._count_idle()
        stream = self._find(header)
        if stream is None:
            return None
        try:
            self._check_data(stream, header)
        except StreamFault as fault:
            self._fail(fault)
            return None
        return stream

    def on_data_end(self, header: FrameHeader) -> None:
        """See `FrameHandler`."""
        stream = self._endpoint.streams.get(header.stream_id)
        if stream is None:
            return
        stream.events.on_bytes(header.length)
        if header.has(h2.END_STREAM):
            stream.end_of_data()
            self._endpoint.forget_if_done(stream)

    def _check_order(self, header: FrameHeader) -> None:
        if not self._endpoint.settled and (header.kind != Kind.SETTINGS or header.has(h2.ACK)):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS must come first")
        if self._block is not None and (
            header.kind != Kind.CONTINUATION or header.stream_id != self._block.header.stream_id
        ):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "another frame within a header block")

    def _count_idle(self) -> None:
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many frames that move nothing")

    def _find(self, header: FrameHeader) -> Stream | None:
        """The frame's stream; None when it has ended. Raises ConnectionFault where none was opened."""
        stream_id, newest = header.stream_id, self._endpoint.newest_id
        if stream_id % 2 == 0 or stream_id > newest:
            name = Kind(header.kind).name
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"{name} on stream {stream_id}, which was never opened")
        return self._endpoint.streams.get(stream_id)

    def _check_data(self, stream: Stream, header: FrameHeader) -> None:
        if stream.remote_done:
            raise StreamFault(stream.id, Code.STREAM_CLOSED, "DATA after the stream's end")
        if not stream.headers_received:
            raise StreamFault(stream.id, Code.PROTOCOL_ERROR, "DATA before headers")
        try:
            stream.receive_window.take(header.length)
        except WindowOverflowError as error:
            raise StreamFault(stream.id, Code.FLOW_CONTROL_ERROR, str(error)) from error

    def _fail(self, fault: StreamFault) -> None:
        stream = self._endpoint.streams.get(fault.stream_id)
        if stream is None:
            self._endpoint.out += h2.reset_frame(fault.stream_id, fault.code)
            return
        self._endpoint.reset(stream, fault.code)
        stream.events.on_reset(fault.code, str(fault))

    def _on_headers(self, header: FrameHeader, payload: bytes) -> None:
        if header.stream_id % 2 == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"HEADERS on stream {header.stream_id}")
        fragment = h2.strip_header_padding(header, payload)
        if header.has(h2.END_HEADERS):
            self._on_block(header, fragment)
        else:
            self._block = _HeaderBlock(header, fragment)

    def _on_continuation(self, header: FrameHeader, payload: bytes) -> None:
        block = self._block
        if block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        block.add(payload)
        if header.has(h2.END_HEADERS):
            self._block = None
            self._on_block(block.header, bytes(block.content))

    def _on_block(self, header: FrameHeader, block: bytes) -> None:
        # Decoded whatever becomes of the stream: the table of the connection depends on it.
        headers = self._endpoint.codec.decode(block)
        endpoint, stream_id = self._endpoint, header.stream_id
        ended = header.has(h2.END_STREAM)
        if endpoint.accept is not None and stream_id > endpoint.newest_id:
            endpoint.newest_id = stream_id
            if endpoint.going_away or len(endpoint.streams) >= endpoint.limits.max_streams:
                self._count_idle()
                raise StreamFault(stream_id, Code.REFUSED_STREAM, "too many streams")
            stream = endpoint.new_stream(stream_id)
            stream.headers_received = True
            endpoint.listen(stream, endpoint.accept(stream, headers))
            stream.events.on_headers(headers, ended=ended)
        else:
            found = self._find(header)
            if found is None:
                self._count_idle()
                return
            stream = found
            self._more_headers(stream, ended)
            stream.headers_received = True
            stream.events.on_headers(headers, ended=ended)
        if ended:
            stream.end_of_data()
            endpoint.forget_if_done(stream)

    def _more_headers(self, stream: Stream, ended: bool) -> None:
        if stream.remote_done:
            raise StreamFault(stream.id, Code.STREAM_CLOSED, "HEADERS after the stream's end")
        if stream.headers_received and not ended:
            # A client may get interim headers (1xx); gRPC has none.
            raise StreamFault(stream.id, Code.PROTOCOL_ERROR, "headers in the middle")

    def _on_priority(self, header: FrameHeader, payload: bytes) -> None:
        if len(payload) != 5:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"PRIORITY of {len(payload)} bytes")
        if header.stream_id == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY of the connection")
        self._count_idle()

    def _on_reset(self, header: FrameHeader, payload: bytes) -> None:
        code = h2.parse_uint32(payload, Kind.RST_STREAM)
        stream = self._find(header)
        self._count_idle()
        if stream is not None:
            self._endpoint.streams.pop(stream.id)
            stream.drop()
            known = Code(code) if code in set(Code) else Code.INTERNAL_ERROR
            stream.events.on_reset(known, f"the peer has reset the stream ({known.name})")

    def _on_settings(self, header: FrameHeader, payload: bytes) -> None:
        if header.stream_id != 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS of a stream")
        if header.has(h2.ACK):
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "an answer to SETTINGS with content")
            return
        self._count_idle()
        for identifier, value in h2.parse_settings(payload):
            apply_setting(self._endpoint, identifier, value)
        self._endpoint.settled = True
        self._endpoint.on_settled()
        self._endpoint.out += h2.SETTINGS_ACK

    def _on_push(self, header: FrameHeader, payload: bytes) -> None:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody has asked for")

    def _on_ping(self, header: FrameHeader, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if header.stream_id != 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PING of a stream")
        self._count_idle()
        if not header.has(h2.ACK):
            self._endpoint.out += h2.ping_frame(payload, ack=True)

    def _on_goaway(self, header: FrameHeader, payload: bytes) -> None:
        if len(payload) < 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        if header.stream_id != 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY of a stream")
        self._count_idle()
        endpoint = self._endpoint
        endpoint.going_away = True
        if endpoint.accept is not None:
            return
        last = int.from_bytes(payload[:4]) & h2.MAX_WINDOW
        for stream in [stream for stream in endpoint.streams.values() if stream.id > last]:
            endpoint.reset(stream, Code.CANCEL)
            stream.events.on_reset(Code.REFUSED_STREAM, "the peer is going away")

    def _on_window(self, header: FrameHeader, payload: bytes) -> None:
        increment = h2.parse_uint32(payload, Kind.WINDOW_UPDATE) & h2.MAX_WINDOW
        endpoint = self._endpoint
        if header.stream_id == 0:
            if increment == 0:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            try:
                endpoint.send_window.grow(increment)
            except WindowOverflowError as error:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, str(error)) from error
            for stream in list(endpoint.streams.values()):
                endpoint.on_window(stream)
            return
        found = self._find(header)
        if found is None:
            return
        if increment == 0:
            raise StreamFault(found.id, Code.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        try:
            found.send_window.grow(increment)
        except WindowOverflowError as error:
            raise StreamFault(found.id, Code.FLOW_CONTROL_ERROR, str(error)) from error
        endpoint.on_window(found)


class _HeaderBlock:
    """A header block that is not complete."""

    def __init__(self, header: FrameHeader, fragment: bytes) -> None:
        self.header = header
        self.content = bytearray(fragment)
        self._num_frames = 0

    def add(self, fragment: bytes) -> None:
        self._num_frames += 1
        self.content += fragment
        if self._num_frames > MAX_CONTINUATIONS or len(self.content) > MAX_HEADER_BYTES:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "headers are too long")
