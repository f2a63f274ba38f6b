"""Any gRPC client may send KV: in any encoding that protobuf knows, it arrives as our own sender's does."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff import wire
from kvbaton.handoff.codec import RunningDigest
from kvbaton.handoff.frames import FramePlanner
from kvbaton.handoff.http2.server import serving_kv
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, Reservation, TicketBook
from kvbaton.handoff.sender import METHOD
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import GEOMETRY, PATIENCE, FakeStore, fingerprint, frame_info, header

LARGE = KvGeometry((LayerGeometry(16, 128, 128),) * 3, "float32")
"""16 KiB a token and layer."""


class Receiver:
    """A decode worker's memory, and the KV that somebody sends to it."""

    def __init__(self, geometry: KvGeometry, tokens: range) -> None:
        num_blocks = -(-tokens.stop // 4)
        self.book, self.applied, self.counters = TicketBook(), list[int](), ReceiverCounters()
        self.source, self.sink = FakeStore(geometry, num_blocks), FakeStore(geometry, num_blocks)
        self.blocks, self.tokens = list(reversed(range(num_blocks))), tokens
        for layer in range(geometry.num_layers):
            self.source.fill(layer, range(num_blocks), tokens)
        self.reservation: Reservation = self.book.open(self.blocks, tokens, 1000, self.applied.append)

    def header(self) -> bytes:
        geometry = wire.geometry_to_proto(self.sink.geometry)
        opening = header(self.reservation.ticket, self.tokens, geometry=geometry)
        return pb.TransferRequest(header=opening).SerializeToString()

    def frames(self, frame_bytes: int) -> list[pb.KvFrame]:
        geometry, made = self.source.geometry, list[pb.KvFrame]()
        planner = FramePlanner(geometry, self.tokens.start, self.tokens.stop, frame_bytes)
        for layer in range(geometry.num_layers):
            planner.advance(layer, self.tokens.stop)
        while (rectangle := planner.next()) is not None:
            payload = b"".join(self.source.read(rectangle.layers, range(len(self.blocks)), rectangle.tokens))
            info = frame_info(len(made), rectangle.layers, rectangle.tokens, payload)
            made.append(pb.KvFrame(info=info, payload=payload))
        return made

    @property
    def arrived(self) -> bool:
        sent = self.source.content(range(len(self.blocks)), self.tokens)
        return self.sink.content(self.blocks, self.tokens) == sent

    @asynccontextmanager
    async def called(self) -> AsyncIterator[Any]:
        """A grpcio client's call that takes messages as bytes."""
        servicer = KvTransferServicer(
            lambda: IncomingTransfer(self.book, self.sink, fingerprint(), self.counters), self.counters
        )
        async with (
            serving_kv(servicer.methods, "127.0.0.1", 0) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            yield channel.stream_stream(METHOD, response_deserializer=pb.TransferResponse.FromString)(timeout=PATIENCE)


def commit(frames: list[pb.KvFrame]) -> bytes:
    digest = RunningDigest()
    for frame in frames:
        digest.add(frame.info)
    size = sum(len(frame.payload) for frame in frames)
    whole = pb.KvCommit(first_token_id=7, num_frames=len(frames), payload_bytes=size, digest=digest.value(7))
    return pb.TransferRequest(commit=whole).SerializeToString()


def generated(frame: pb.KvFrame) -> bytes:
    return pb.TransferRequest(frame=frame).SerializeToString()


def payload_first(frame: pb.KvFrame) -> bytes:
    payload = pb.KvFrame(payload=frame.payload).SerializeToString()
    return b"\x12" + varint(len(frame.SerializeToString())) + payload + pb.KvFrame(info=frame.info).SerializeToString()


def unknown_field_behind(frame: pb.KvFrame) -> bytes:
    return generated(frame) + b"\xfa\x3f\x01?"


def unknown_field_before(frame: pb.KvFrame) -> bytes:
    return b"\xfa\x3f\x01?" + generated(frame)


def long_information(frame: pb.KvFrame) -> bytes:
    info = frame.info.SerializeToString() + b"\xfa\x3f" + varint(400) + bytes(400)
    content = b"\x0a" + varint(len(info)) + info + pb.KvFrame(payload=frame.payload).SerializeToString()
    return b"\x12" + varint(len(content)) + content


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


ENCODINGS: list[Callable[[pb.KvFrame], bytes]] = [
    generated, payload_first, unknown_field_behind, unknown_field_before, long_information
]  # fmt: skip


@pytest.mark.parametrize("encode", ENCODINGS)
@pytest.mark.parametrize(
    ("geometry", "tokens", "frame_bytes"),
    [(GEOMETRY, range(3, 43), 100), (GEOMETRY, range(3, 43), 1000), (LARGE, range(1, 60), 1 << 20)],
)
async def test_any_encoding_arrives(
    geometry: KvGeometry, tokens: range, frame_bytes: int, encode: Callable[[pb.KvFrame], bytes]
) -> None:
    receiver = Receiver(geometry, tokens)
    frames = receiver.frames(frame_bytes)
    async with receiver.called() as call:
        await call.write(receiver.header())
        assert (await call.read()).HasField("ready")
        for frame in frames:
            assert pb.TransferRequest.FromString(encode(frame)).frame.payload == frame.payload
            await call.write(encode(frame))
        await call.write(commit(frames))
        assert (await call.read()).applied.num_frames == len(frames)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    assert receiver.arrived
    assert receiver.applied == [7]


@pytest.mark.parametrize("encode", ENCODINGS)
async def test_damage_is_found_in_any_encoding(encode: Callable[[pb.KvFrame], bytes]) -> None:
    receiver = Receiver(GEOMETRY, range(3, 43))
    frame = receiver.frames(1000)[0]
    frame.payload = bytes([frame.payload[0] ^ 1]) + frame.payload[1:]
    async with receiver.called() as call:
        await call.write(receiver.header())
        await call.read()
        await call.write(encode(frame))
        assert "frame.crc32c: frame 0 was damaged" in (await call.read()).rejected.reason
        assert await call.read() is grpc.aio.EOF
    assert receiver.counters.transfers_rejected == 1
    assert receiver.counters.kv_bytes_received == 0


async def test_malformed_bytes_are_refused_with_their_problem() -> None:
    receiver = Receiver(GEOMETRY, range(3, 43))
    async with receiver.called() as call:
        await call.write(receiver.header())
        assert (await call.read()).HasField("ready")
        await call.write(b"\xff")
        assert "malformed message: the message ends within a number" in (await call.read()).rejected.reason
        assert await call.read() is grpc.aio.EOF
    assert receiver.counters.transfers_rejected == 1
