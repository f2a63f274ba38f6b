"""Connections without sockets, for the fuzzer: the real state machines of both ends, fed with any bytes."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fuzz.sides import Sides
from hpack import Encoder
from opentelemetry.trace import INVALID_SPAN

from kvbaton.handoff.http2.calls import ClientCall
from kvbaton.handoff.http2.endpoint import MAX_GATHERED_BYTES, Endpoint, Limits
from kvbaton.handoff.http2.frames import ConnectionFault
from kvbaton.handoff.http2.headers import Headers, request_headers
from kvbaton.handoff.http2.incoming import ServedCall, ServerStream
from kvbaton.handoff.http2.rules import FrameRules
from kvbaton.handoff.http2.streams import Stream, StreamEvents
from kvbaton.handoff.servicer import TransferCall
from kvbaton.v1 import kv_transfer_pb2 as pb
from support import http2_frames as http2
from support.http2_frames import Http2Frame
from support.raw_peer import METHOD, request_block

MAX_MESSAGE_BYTES = 16 << 20
MAX_ANSWER_BYTES = 8 << 20
"""More than this is never due, whatever came."""


def server(data: bytes) -> None:
    """Any bytes from a client: what is applied is what was sent, nothing fails, and at the end nothing is held."""
    _run(_serve, data)


def client(data: bytes) -> None:
    """Any bytes from a server: the call ends, and nothing fails."""
    _run(_call, data)


def _run(connection: Callable[[bytes], None], data: bytes) -> None:
    async def run() -> None:
        connection(data)

    with _failures() as failed, asyncio.Runner() as runner:
        runner.run(run())
    assert not failed, failed


def _serve(data: bytes) -> None:
    sides = Sides()
    calls: list[TransferCall] = []
    ended: list[TransferCall] = []

    class Watched(TransferCall):
        def on_end(self) -> None:
            super().on_end()
            ended.append(self)

    def begin(stream: ServerStream) -> TransferCall:
        calls.append(Watched(sides.attempt(), stream, sides.counters))
        return calls[-1]

    def accept(stream: Stream, headers: Headers) -> StreamEvents:
        return ServedCall({METHOD: begin}, endpoint, stream, "fuzzer", lambda: None)

    endpoint = Endpoint(Limits(MAX_MESSAGE_BYTES), accept)
    _feed(endpoint, data)
    endpoint.lose_all("the end")
    assert sorted(map(id, calls)) == sorted(map(id, ended)), "each call is told of its end, once"
    sides.check()


def _call(data: bytes) -> None:
    endpoint = Endpoint(Limits(MAX_MESSAGE_BYTES, stream_window=1 << 20), None)
    stream = endpoint.open(request_headers("fuzzer", METHOD, 10.0, []))
    call = ClientCall("fuzzer", endpoint, stream, INVALID_SPAN)
    endpoint.listen(stream, call)
    _feed(endpoint, data)
    endpoint.lose_all("the end")
    assert call.ended
    while call.messages:
        call.pop()


def _feed(endpoint: Endpoint, data: bytes) -> None:
    """As `Carrier` does; the first byte says in pieces of which size."""
    rules, rest = FrameRules(endpoint), memoryview(data)[1:]
    size = (data[0] if data else 0) or len(rest)
    # Any other exception is a failure; the carrier would end the connection for it too, and say so in the log.
    with suppress(ConnectionFault):
        while rest:
            piece, rest = rest[:size], rest[size:]
            while piece:
                piece = _take(rules, piece)
            if size == 7:
                rules.tick()
    assert len(endpoint.out) < MAX_ANSWER_BYTES
    assert len(endpoint.streams) <= endpoint.limits.max_streams
    held = MAX_GATHERED_BYTES - endpoint._gathered._left
    assert 0 <= held <= len(data), "more is counted than has come"


def _take(rules: FrameRules, piece: memoryview) -> memoryview:
    """Pass some of the bytes on by the way that the reader offers, and return the rest."""
    reader = rules.reader
    places = reader.direct()
    if not places:
        reader.feed(piece)
        return piece[len(piece) :]
    room = sum(map(len, places))
    placed, left = 0, piece[: min(room, len(piece))]
    try:
        with reader.guard:
            for place in places:
                part = left[: len(place)]
                place[: len(part)] = part
                left, placed = left[len(part) :], placed + len(part)
    except Exception as error:
        reader.refuse(error)
        return piece
    reader.landed(placed)
    return piece[placed:]


@contextmanager
def _failures() -> Iterator[list[str]]:
    """What is logged as an error meanwhile: failures that a service hides from its peers."""
    failed: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failed.append(f"{record.getMessage()} {record.exc_info}")

    handler, log = Listening(logging.ERROR), logging.getLogger("kvbaton")
    log.addHandler(handler)
    try:
        yield failed
    finally:
        log.removeHandler(handler)


def client_bytes() -> list[bytes]:
    """A client that makes a whole transfer, in pieces of several sizes."""
    encoder, messages = Encoder(), b"".join(map(http2.grpc_message, Sides().messages(1)))
    opened = Http2Frame(http2.HEADERS, http2.END_HEADERS, 1, request_block(encoder, grpc_timeout="10S")).encoded()
    begin = http2.PREFACE + http2.settings((4, 1 << 20)) + http2.window_update(0, 1 << 20) + opened
    whole = begin + Http2Frame(http2.DATA, http2.END_STREAM, 1, messages).encoded()
    cut = begin + b"".join(
        Http2Frame(http2.DATA, 0, 1, messages[at : at + 100]).encoded() for at in range(0, len(messages), 100)
    )
    padded = begin + Http2Frame(http2.DATA, http2.PADDED | http2.END_STREAM, 1, b"\3" + messages + b"\0\0\0").encoded()
    extras = [
        Http2Frame(http2.PING, 0, 0, bytes(8)).encoded(),
        Http2Frame(http2.RST_STREAM, 0, 1, bytes(4)).encoded(),
        Http2Frame(http2.GOAWAY, 0, 0, bytes(8)).encoded(),
        Http2Frame(http2.PRIORITY, 0, 1, bytes(5)).encoded(),
        http2.window_update(1, 100),
    ]
    ends = [bytes((size,)) + data for size in (0, 1, 7, 50) for data in (whole, cut, padded)]
    return [*ends, *(b"\0" + cut[: len(begin) + 400] + extra for extra in extras)]


def server_bytes() -> list[bytes]:
    """A server that says ready and applied, and one that fails."""
    encoder = Encoder()
    headers = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    answers = [
        pb.TransferResponse(ready=pb.KvReady(transport="grpc")),
        pb.TransferResponse(applied=pb.KvApplied(num_frames=3, payload_bytes=100)),
    ]
    messages = b"".join(http2.grpc_message(answer.SerializeToString()) for answer in answers)
    trailers = encoder.encode([("grpc-status", "0")])
    failure = Encoder().encode([(":status", "200"), ("grpc-status", "5"), ("grpc-message", "no%20ticket")])
    begin = http2.settings((3, 100), (4, 1 << 20)) + http2.window_update(0, 1 << 20)
    good = (
        begin
        + Http2Frame(http2.HEADERS, http2.END_HEADERS, 1, headers).encoded()
        + Http2Frame(http2.DATA, 0, 1, messages).encoded()
        + Http2Frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, trailers).encoded()
    )
    bad = begin + Http2Frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, failure).encoded()
    away = begin + Http2Frame(http2.GOAWAY, 0, 0, bytes(8) + b"bye").encoded()
    return [bytes((size,)) + data for size in (0, 1, 7) for data in (good, bad, away)]
