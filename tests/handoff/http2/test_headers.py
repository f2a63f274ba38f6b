"""Headers, trailers and their encodings: ours are gRPC's, and what a peer writes is understood or refused."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.handoff.http2 import headers as h
from kvbaton.handoff.http2.frames import ConnectionFault

REQUEST = [(":method", "POST"), (":path", "/a.B/C"), ("content-type", "application/grpc+proto")]


@given(st.floats(1e-9, 1e10))
def test_a_timeout_is_never_shortened_and_hardly_lengthened(seconds: float) -> None:
    text = h.format_timeout(seconds)
    assert len(text) <= 9
    assert seconds * 0.999999 <= h.parse_timeout(text) <= seconds * 1.001 + 1e-9


@pytest.mark.parametrize("text", ["", "1", "S", "123456789S", "1x", "-1S", "1.5S", "１S"])
def test_a_timeout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(h.HeaderError):
        h.parse_timeout(text)


@given(st.text())
def test_a_message_comes_back(text: str) -> None:
    encoded = h.encode_message(text)
    assert encoded.isascii()
    assert encoded.isprintable()
    assert h.decode_message(encoded) == text.encode(errors="replace").decode()


@given(st.text(st.characters(max_codepoint=255)))
def test_any_message_can_be_read(text: str) -> None:
    h.decode_message(text)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(":method", "GET"), *REQUEST[1:]],
        [(":method", "POST"), (":path", "x"), REQUEST[2]],
        [*REQUEST[:2], ("content-type", "text/html")],
        [*REQUEST[:2], ("content-type", "application/grpcx")],
        [*REQUEST[:2]],
        [*REQUEST, (":path", "/late")],
        [REQUEST[0], *REQUEST],
        [*REQUEST, ("grpc-timeout", "soon")],
    ],
)
def test_what_is_no_call_is_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(h.HeaderError):
        h.parse_request(headers)


def test_a_request_comes_back() -> None:
    codec, peer = h.HeaderCodec(), h.HeaderCodec()
    for _ in range(3):
        sent = h.request_headers("host:1", "/a.B/C", 1.5, [("TraceParent", "00-1"), ("x-bin", b"\0\xff")])
        call = h.parse_request(peer.decode(codec.encode(sent)))
        assert (call.method, call.timeout) == ("/a.B/C", 1.5)
        assert dict(call.metadata)["traceparent"] == "00-1"
        assert dict(call.metadata)["x-bin"] == "AP8="


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_trailers_come_back(code: grpc.StatusCode) -> None:
    codec, peer = h.HeaderCodec(), h.HeaderCodec()
    sent = h.trailers(code, "50 % of näh\n", [("details-bin", b"\1\2\3")])
    assert h.parse_trailers(peer.decode(codec.encode(sent))) == (code, "50 % of näh\n", [("details-bin", b"\1\2\3")])


@pytest.mark.parametrize("status", ["", "x", "-1", "99", "1" * 30, "²"])
def test_a_status_that_is_none_is_unknown(status: str) -> None:
    assert h.parse_trailers([("grpc-status", status), ("x-bin", "!")])[0] is grpc.StatusCode.UNKNOWN


@given(st.binary(max_size=300))
def test_any_block_is_read_or_refused(block: bytes) -> None:
    codec = h.HeaderCodec()
    try:
        codec.decode(block)
    except ConnectionFault:
        return


def test_a_block_that_expands_without_end_is_refused() -> None:
    codec, peer = h.HeaderCodec(), h.HeaderCodec()
    peer.decode(codec.encode([("bomb", "x" * 3000)]))
    with pytest.raises(ConnectionFault, match="too long"):
        peer.decode(codec.encode([("bomb", "x" * 3000)] * 1000))
