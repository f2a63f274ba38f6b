"""What comes from a peer may be anything: it ends a stream or the connection by the right code, and never more."""

import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.handoff.http2 import frames as h2
from kvbaton.handoff.http2.endpoint import Endpoint, Limits
from kvbaton.handoff.http2.frames import Code, ConnectionFault, Kind, Setting
from kvbaton.handoff.http2.headers import HeaderCodec, Headers
from kvbaton.handoff.http2.messages import Placement
from kvbaton.handoff.http2.rules import MAX_CONTINUATIONS, MAX_IDLE_FRAMES, FrameRules
from kvbaton.handoff.http2.streams import STALL_TICKS, Stream, StreamEvents

REQUEST = [(":method", "POST"), (":path", "/a.B/C"), ("content-type", "application/grpc")]
GREETING = h2.PREFACE + h2.settings_frame({})


class Events:
    """What a stream's listener has heard."""

    def __init__(self, endpoint: Endpoint, stream: Stream) -> None:
        self.endpoint, self.stream = endpoint, stream
        self.heard: list[str] = []

    def place(self, start: memoryview, size: int) -> Placement | None:
        return None

    def on_placed(self) -> None:
        self.heard.append("placed")

    def on_message(self, message: bytes) -> None:
        self.heard.append(f"message of {len(message)}")

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        self.heard.append("trailers" if ended else "headers")

    def on_bytes(self, count: int) -> None:
        self.endpoint.release(self.stream, count)

    def on_half_close(self) -> None:
        self.heard.append("half-close")

    def on_window(self) -> None:
        pass

    def on_failure(self, error: Exception) -> None:
        self.heard.append(type(error).__name__)

    def on_reset(self, code: Code, reason: str) -> None:
        self.heard.append(code.name)


class Server:
    """A server's end, fed by hand."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.calls: list[Events] = []
        self.endpoint = Endpoint(limits or Limits(1 << 20), self._accept)
        self.rules = FrameRules(self.endpoint)
        self.codec = HeaderCodec()

    def _accept(self, stream: Stream, headers: Headers) -> StreamEvents:
        self.calls.append(Events(self.endpoint, stream))
        return self.calls[-1]

    def feed(self, *frames: bytes) -> "Server":
        self.rules.reader.feed(memoryview(b"".join(frames)))
        return self

    def request(self, stream_id: int = 1, *, end: bool = False) -> bytes:
        return h2.header_frames(stream_id, self.codec.encode(REQUEST), 16_384, end_stream=end)

    def sent(self) -> list[tuple[Kind, int, bytes]]:
        """What it has sent since it was asked last: kind, stream, payload."""
        data, found = bytes(self.endpoint.out), []
        self.endpoint.out.clear()
        while data:
            header = h2.parse_header(data[:9])
            found.append((Kind(header.kind), header.stream_id, data[9 : 9 + header.length]))
            data = data[9 + header.length :]
        return found


def greeted() -> Server:
    server = Server()
    server.feed(GREETING)
    server.sent()
    return server


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return h2.pack_header(len(payload), kind, flags, stream_id) + payload


def setting(identifier: int, value: int) -> bytes:
    return h2.settings_frame({identifier: value})


FAULTS: dict[str, tuple[Code, Callable[[Server], bytes]]] = {
    "a frame that is too long to be": (Code.ENHANCE_YOUR_CALM, lambda s: h2.pack_header(2**24 - 1, Kind.HEADERS, 4, 1)),
    "data of no stream": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.DATA, 0, 0, b"x")),
    "data of an unopened stream": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.DATA, 0, 7, b"x")),
    "headers of an even stream": (Code.PROTOCOL_ERROR, lambda s: s.request(2)),
    "headers of no stream": (Code.PROTOCOL_ERROR, lambda s: s.request(0)),
    "a reset of an unopened stream": (Code.PROTOCOL_ERROR, lambda s: h2.reset_frame(9, 0)),
    "a reset of five bytes": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.RST_STREAM, 0, 1, bytes(5))),
    "a window of three bytes": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.WINDOW_UPDATE, 0, 0, bytes(3))),
    "a window by nothing": (Code.PROTOCOL_ERROR, lambda s: h2.window_frame(0, 0)),
    "a window that overflows": (Code.FLOW_CONTROL_ERROR, lambda s: h2.window_frame(0, h2.MAX_WINDOW)),
    "settings of seven bytes": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.SETTINGS, 0, 0, bytes(7))),
    "settings of a stream": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.SETTINGS, 0, 1)),
    "an answer to settings with content": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.SETTINGS, h2.ACK, 0, bytes(6))),
    "a push setting of two": (Code.PROTOCOL_ERROR, lambda s: setting(Setting.ENABLE_PUSH, 2)),
    "a window setting above all": (Code.FLOW_CONTROL_ERROR, lambda s: setting(Setting.INITIAL_WINDOW_SIZE, 2**31)),
    "frames that are too small": (Code.PROTOCOL_ERROR, lambda s: setting(Setting.MAX_FRAME_SIZE, 16_383)),
    "frames that are too large": (Code.PROTOCOL_ERROR, lambda s: setting(Setting.MAX_FRAME_SIZE, 2**24)),
    "a ping of nine bytes": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.PING, 0, 0, bytes(9))),
    "a ping of a stream": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.PING, 0, 1, bytes(8))),
    "a short goodbye": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.GOAWAY, 0, 0, bytes(7))),
    "a push": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.PUSH_PROMISE, h2.END_HEADERS, 1, bytes(4))),
    "a priority of four bytes": (Code.FRAME_SIZE_ERROR, lambda s: frame(Kind.PRIORITY, 0, 1, bytes(4))),
    "a continuation of nothing": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.CONTINUATION, h2.END_HEADERS, 1)),
    "a ping within headers": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.HEADERS, 0, 1) + h2.ping_frame(bytes(8))),
    "a header block that is none": (Code.COMPRESSION_ERROR, lambda s: frame(Kind.HEADERS, 4, 1, b"\xff\xff\xff\xff")),
    "padding beyond the headers": (Code.PROTOCOL_ERROR, lambda s: frame(Kind.HEADERS, 12, 1, b"\xff")),
    "padding beyond the data": (Code.PROTOCOL_ERROR, lambda s: s.request() + frame(Kind.DATA, 8, 1, b"\xff")),
    "padded data without its length": (Code.FRAME_SIZE_ERROR, lambda s: s.request() + frame(Kind.DATA, 8, 1)),
    "a flood of pings": (Code.ENHANCE_YOUR_CALM, lambda s: h2.ping_frame(bytes(8)) * (MAX_IDLE_FRAMES + 1)),
    "a flood of settings": (Code.ENHANCE_YOUR_CALM, lambda s: h2.settings_frame({}) * (MAX_IDLE_FRAMES + 1)),
    "a flood of empty data": (
        Code.ENHANCE_YOUR_CALM,
        lambda s: s.request() + frame(Kind.DATA, 0, 1) * (MAX_IDLE_FRAMES + 1),
    ),
    "a flood of unknown frames": (Code.ENHANCE_YOUR_CALM, lambda s: frame(99, 0, 1) * (MAX_IDLE_FRAMES + 1)),
    "a flood of resets": (
        Code.ENHANCE_YOUR_CALM,
        lambda s: b"".join(s.request(n) + h2.reset_frame(n, 8) for n in range(1, 2 * MAX_IDLE_FRAMES + 5, 2)),
    ),
    "a flood of empty continuations": (
        Code.ENHANCE_YOUR_CALM,
        lambda s: frame(Kind.HEADERS, 0, 1) + frame(Kind.CONTINUATION, 0, 1) * (MAX_CONTINUATIONS + 1),
    ),
    "headers without end": (
        Code.ENHANCE_YOUR_CALM,
        lambda s: frame(Kind.HEADERS, 0, 1, bytes(9000)) + frame(Kind.CONTINUATION, 0, 1, bytes(9000)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_connection_by_its_code(name: str) -> None:
    code, make = FAULTS[name]
    server = greeted()
    with pytest.raises(ConnectionFault) as caught:
        server.feed(make(server))
    assert caught.value.code is code


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", b"\x16\x03\x01"])
def test_what_is_no_http2_is_noticed_at_once(start: bytes) -> None:
    with pytest.raises(ConnectionFault, match="not HTTP/2"):
        Server().feed(start)


def test_settings_must_come_first() -> None:
    with pytest.raises(ConnectionFault, match="SETTINGS must come first"):
        Server().feed(h2.PREFACE, h2.ping_frame(bytes(8)))


def test_a_peer_that_overruns_a_streams_window_loses_the_stream() -> None:
    server = Server(Limits(1 << 20, stream_window=1000))
    server.feed(GREETING, server.request(1), server.request(3))
    server.sent()
    server.feed(frame(Kind.DATA, 0, 1, bytes(1001)), frame(Kind.DATA, 0, 3, b"\0\0\0\0\1x"))
    assert server.calls[0].heard == ["headers", "FLOW_CONTROL_ERROR"]
    assert server.calls[1].heard == ["headers", "message of 1"]
    assert server.sent() == [(Kind.RST_STREAM, 1, struct.pack(">I", Code.FLOW_CONTROL_ERROR))]


def test_data_after_the_end_costs_the_stream() -> None:
    server = greeted()
    server.feed(server.request(end=True), frame(Kind.DATA, 0, 1, b"x"))
    assert server.calls[0].heard == ["trailers", "half-close", "STREAM_CLOSED"]


def test_more_streams_than_announced_are_refused_and_the_others_live() -> None:
    server = Server(Limits(1 << 20, max_streams=2))
    server.feed(GREETING)
    server.sent()
    server.feed(*(server.request(number) for number in (1, 3, 5)))
    assert server.sent() == [(Kind.RST_STREAM, 5, struct.pack(">I", Code.REFUSED_STREAM))]
    assert len(server.endpoint.streams) == 2
    server.feed(h2.reset_frame(1, Code.CANCEL), server.request(7))
    assert server.sent() == []


def test_padding_and_unknown_frames_change_nothing() -> None:
    server = greeted()
    block = server.codec.encode(REQUEST)
    padded = frame(Kind.HEADERS, h2.END_HEADERS | h2.PADDED | h2.PRIORITISED, 1, b"\3" + bytes(5) + block + bytes(3))
    data = b"\0\0\0\0\4abcd"
    server.feed(padded, frame(200, 0xFF, 1, b"?" * 70_000))
    for piece in (data[:3], data[3:]):
        server.feed(frame(Kind.DATA, h2.PADDED, 1, b"\5" + piece + bytes(5)))
    server.feed(frame(Kind.DATA, h2.PADDED | h2.END_STREAM, 1, b"\0"))
    assert server.calls[0].heard == ["headers", "message of 4", "half-close"]


def test_a_ping_is_answered_and_settings_are_acknowledged() -> None:
    server = greeted()
    server.feed(h2.ping_frame(b"12345678"), h2.settings_frame({99: 1}))
    assert server.sent() == [(Kind.PING, 0, b"12345678"), (Kind.SETTINGS, 0, b"")]


def test_answers_wait_for_the_window_and_trailers_for_them() -> None:
    server = Server()
    server.feed(h2.PREFACE, setting(Setting.INITIAL_WINDOW_SIZE, 10), server.request())
    server.sent()
    stream = server.calls[0].stream
    assert server.endpoint.send_soon(stream, b"a" * 25)
    server.endpoint.end(stream, [("grpc-status", "0")])
    assert [(kind, len(data)) for kind, _, data in server.sent()] == [(Kind.DATA, 10)]
    server.feed(setting(Setting.INITIAL_WINDOW_SIZE, 12))
    server.feed(h2.window_frame(1, 100))
    kinds = [(kind, len(data)) for kind, _, data in server.sent() if kind is not Kind.SETTINGS]
    assert kinds[:2] == [(Kind.DATA, 2), (Kind.DATA, 13)]
    assert [kind for kind, _ in kinds[2:]] == [Kind.HEADERS, Kind.RST_STREAM]
    assert not server.endpoint.streams


def test_too_many_answers_that_wait_are_too_many() -> None:
    server = Server()
    server.feed(h2.PREFACE, setting(Setting.INITIAL_WINDOW_SIZE, 0), server.request())
    stream = server.calls[0].stream
    assert server.endpoint.send_soon(stream, bytes(900_000))
    assert not server.endpoint.send_soon(stream, bytes(900_000))


def test_a_message_that_stalls_fails_its_stream_alone() -> None:
    server = greeted()
    server.feed(server.request(1), server.request(3), frame(Kind.DATA, 0, 1, b"\0\0\0\0\4ab"))
    for _ in range(STALL_TICKS):
        server.rules.tick()
    assert server.calls[0].heard == ["headers"]
    server.rules.tick()
    assert server.calls[0].heard == ["headers", "StalledError"]
    assert server.calls[1].heard == ["headers"]


pieces = st.one_of(
    st.binary(max_size=60),
    st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=60)),
    st.builds(lambda n, p: frame(Kind.DATA, 0, n, p), st.sampled_from([1, 3]), st.binary(max_size=400)),
    st.builds(setting, st.integers(0, 7), st.integers(0, 2**32 - 1)),
    st.builds(h2.window_frame, st.integers(0, 5), st.integers(0, 2**31 - 1)),
    st.builds(h2.reset_frame, st.integers(0, 5), st.integers(0, 20)),
    st.sampled_from(["open 1", "open 3", "tick"]),
)


@settings(max_examples=300)
@given(st.lists(pieces, max_size=30), st.booleans())
def test_whatever_comes_nothing_but_a_fault_comes_out(incoming: list[bytes | str], whole: bool) -> None:
    server = greeted()
    try:
        for piece in incoming:
            if piece == "tick":
                server.rules.tick()
                continue
            data = server.request(int(piece[-1])) if isinstance(piece, str) else piece
            for part in [data] if whole else [data[at : at + 1] for at in range(len(data))]:
                server.feed(part)
    except ConnectionFault:
        server.endpoint.lose_all("its peer broke the protocol")
        assert not server.endpoint.streams
    assert len(server.endpoint.streams) <= 2


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_a_client_survives_any_server(incoming: list[bytes]) -> None:
    endpoint = Endpoint(Limits(1 << 20, 1000), None)
    rules = FrameRules(endpoint)
    rules.reader.feed(memoryview(h2.settings_frame({})))
    stream = endpoint.open(REQUEST)
    endpoint.listen(stream, Events(endpoint, stream))
    try:
        for data in incoming:
            rules.reader.feed(memoryview(data))
    except ConnectionFault:
        return


def test_a_length_claim_takes_no_memory() -> None:
    server = greeted()
    server.feed(server.request())
    tracemalloc.start()
    try:
        server.feed(h2.pack_header(2**24 - 1, Kind.DATA, 0, 1), b"\0\xff\xff\xff\xff")
        server.feed(bytes(1000))
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()
    assert server.calls[0].heard == ["headers", "TooLargeError"]
