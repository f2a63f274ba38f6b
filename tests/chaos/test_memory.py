"""What a peer can make this process hold is bounded, as docs/protocol.md says: by what it sends and claims, by what it
does not read, and by how much it opens.
"""

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.http2 import calls, carrier, server
from support import chaos, faults
from support.chaos import TOKENS, Ends, settled
from support.fakes import PATIENCE
from support.fault_proxy import Passed, Then
from support.http2_frames import RST_STREAM, grpc_message
from support.raw_peer import RawPeer, raw_peer

LARGE = KvGeometry((LayerGeometry(8, 64, 64),) * 8, "float32")
"""32 KiB a token."""
MIB = 1 << 20
SLACK = 16 * MIB
"""The allocator's."""


@pytest.fixture
async def peer(ends: Ends) -> AsyncIterator[RawPeer]:
    """Connected to the receiver of `ends` itself."""
    async with raw_peer(ends.proxy.upstream) as connected:
        yield connected


def growth(before: int) -> int:
    gc.collect()
    return chaos.resident_bytes() - before


@pytest.mark.parametrize("frame_bytes", [MIB])
@pytest.mark.parametrize("then", [Then.HOLD, Then.FREEZE])
async def test_a_receiver_that_stops_reading_costs_the_sender_nothing(
    then: Then, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = range(2048)
    async with chaos.ends(LARGE, num_blocks=512) as ends:
        outgoing = ends.compute(tokens)
        reservation = ends.reserve(tokens, random.Random(1))
        ends.proxy.strike(faults.at("frame", 4, lambda data: Passed(grpc_message(data), then)))
        monkeypatch.setattr(carrier, "TICK_SECONDS", 0.05)
        monkeypatch.setattr(calls, "STALL_SECONDS", 0.5)
        before = chaos.resident_bytes()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(_lost(ends.send(reservation, outgoing)))
            most = 0
            while not sending.done():
                most = max(most, growth(before))
                await asyncio.sleep(0.01)
        # The fakes copy a frame to read it, and the proxy and asyncio hold some in this process too.
        assert most < SLACK
        assert ends.applied == []


async def _lost(sending: Awaitable[object]) -> None:
    with pytest.raises(UnavailableError):
        await sending


async def test_a_claim_costs_nothing_until_it_is_sent(ends: Ends, peer: RawPeer) -> None:
    before = chaos.resident_bytes()
    streams = [peer.open() for _ in range(500)]
    for stream in streams:
        # Each of them as long as any message may be, and of a kind that has no place of its own.
        peer.data(stream, grpc_message(faults.field(1, b"", 15 * MIB) + bytes(400), length=15 * MIB + 5))
    await _all_taken(ends, peer, len(streams))
    assert growth(before) < SLACK
    peer.writer.close()
    await settled(ends.attempts, chaos.num_descriptors())


async def _all_taken(ends: Ends, peer: RawPeer, count: int) -> None:
    """Wait until the receiver knows of `count` calls, and what was sent before is taken."""
    async with asyncio.timeout(PATIENCE):
        while len(ends.attempts) < count:
            await asyncio.sleep(0.01)
    # Answered in order: what came before the call has been read.
    probe = peer.open("/kvbaton.v1.KvTransferService/Nothing", end=True)
    assert (await peer.end_of(probe))["grpc-status"] == "12"


async def test_unfinished_messages_are_bounded_for_a_connection(ends: Ends, peer: RawPeer) -> None:
    before = chaos.resident_bytes()
    streams = []
    # There is room for four of them.
    for _ in range(8):
        streams.append(peer.open())
        peer.data(streams[-1], grpc_message(faults.field(1, b"", 15 * MIB), length=15 * MIB + 5))
        for _ in range(15 * 16 - 1):
            # In small pieces: what waits to be sent is in this process as well.
            peer.data(streams[-1], bytes(MIB // 16))
            await peer.writer.drain()
    refused = await peer.end_of(streams[4])
    assert refused["grpc-status"] == "8"
    assert "memory" in refused["grpc-message"]
    assert growth(before) < 64 * MIB * 9 / 8 + SLACK
    peer.writer.close()
    await settled(ends.attempts, chaos.num_descriptors())


@pytest.mark.parametrize("length", [16 * MIB + 1, 2**32 - 1])
async def test_a_longer_message_is_refused_at_its_prefix(ends: Ends, peer: RawPeer, length: int) -> None:
    stream = peer.open()
    peer.data(stream, grpc_message(b"x", length=length))
    refused = await peer.end_of(stream)
    assert refused["grpc-status"] == "8"
    assert str(length) in refused["grpc-message"]
    await settled(ends.attempts, chaos.num_descriptors())


async def test_streams_of_a_connection_are_bounded(ends: Ends, peer: RawPeer) -> None:
    before = chaos.resident_bytes()
    streams = [peer.open() for _ in range(1200)]
    await peer.writer.drain()
    refused = []
    while frame := await peer.read():
        if frame.kind == RST_STREAM:
            refused.append(frame.stream)
            assert int.from_bytes(frame.payload, "big") == 7, "REFUSED_STREAM"
            if len(refused) == len(streams) - 1024:
                break
    assert refused == streams[1024:]
    assert len(ends.attempts) == 1024
    assert growth(before) < SLACK
    peer.writer.close()
    await settled(ends.attempts, chaos.num_descriptors())


async def test_connections_are_bounded_and_leave_room_for_those_that_were_there(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    await ends.undisturbed(rng)
    descriptors = chaos.num_descriptors()
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(raw_peer(ends.proxy.upstream, greet=bool(index % 2))) for index in range(40)
        ]
        assert await peers[-1].closed()
        # Both ends of a connection are in this process.
        assert chaos.num_descriptors() <= descriptors + len(peers) + 20
        await ends.undisturbed(rng)
    await settled(ends.attempts, descriptors)


async def test_a_connection_that_never_says_anything_is_closed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "TICK_SECONDS", 0.01)
    descriptors = chaos.num_descriptors()
    for first in (b"", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0"):
        async with raw_peer(ends.proxy.upstream, greet=False) as peer:
            peer.send(first)
            assert await peer.closed()
    await settled(ends.attempts, descriptors)


async def test_a_peer_that_reads_no_answers_is_closed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "MAX_OUT_BYTES", MIB // 16)
    descriptors = chaos.num_descriptors()
    before = chaos.resident_bytes()

    async def never_reading(peer: RawPeer) -> None:
        # Each of these calls is refused in some hundred bytes, which fill what a kernel keeps and then the rest.
        while True:
            peer.open("/nothing/" + "x" * 200, end=True)
            await asyncio.sleep(0)
            await peer.writer.drain()

    async with raw_peer(ends.proxy.upstream, receive_bytes=4096) as peer:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(4 * PATIENCE):
            with pytest.raises(ConnectionError):
                await never_reading(peer)
    assert growth(before) < SLACK
    await settled(ends.attempts, descriptors)


async def test_a_transfer_beside_all_this_goes_on(ends: Ends, peer: RawPeer) -> None:
    rng = random.Random(3)
    for _ in range(100):
        peer.data(peer.open(), grpc_message(faults.field(1, b"", 15 * MIB) + bytes(400), length=15 * MIB + 5))
    await peer.writer.drain()
    reservation = ends.reserve(TOKENS, rng)
    await ends.send(reservation, ends.compute(TOKENS))
    assert ends.arrived(reservation)
