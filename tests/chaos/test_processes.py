"""A peer that is killed or stopped in the middle of a transfer is noticed, nothing stays held for it, and the next
attempt succeeds; one that goes on later finds that it is too late.

The connection's clock runs ten times as fast as in service: a peer may be silent for 3 s instead of half a minute.
"""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.handoff.http2 import carrier
from support import chaos, faults
from support.chaos import TOKENS, Ends, settled
from support.fakes import PATIENCE
from support.fault_proxy import Then
from support.peer_process import PeerProcess, peer_process

TICK = 0.1
STRIKES = [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 2)]
"""Each with its seed."""


@pytest.fixture(autouse=True)
def _fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "TICK_SECONDS", TICK)


@pytest.fixture
async def sender(ends: Ends) -> AsyncIterator[PeerProcess]:
    """Sends through the proxy to the receiver here."""
    async with peer_process(TICK, "send", ends.proxy.endpoint) as process:
        reservation = ends.reserve(TOKENS, random.Random(0))
        answer = await process.ask(ticket=reservation.ticket.hex(), attempt=1)
        assert answer == {"error": ""}
        ends.applied.clear()
        yield process


@pytest.fixture
async def receiver(ends: Ends) -> AsyncIterator[PeerProcess]:
    """Receives what is sent from here through the proxy."""
    async with peer_process(TICK, "receive") as process:
        ends.proxy.upstream = (await process.ask())["endpoint"]
        yield process


def strike(ends: Ends, num_frames: int, rng: random.Random, pid: int, number: signal.Signals) -> None:
    """The process gets the signal when a random frame passes; what it has given to the kernel already stays there."""
    frame = rng.randrange(num_frames)
    ends.proxy.strike(faults.calling("frame", frame, lambda: os.kill(pid, number), Then.HOLD))


@pytest.mark.parametrize(("number", "seed"), STRIKES)
async def test_the_sender_is_lost(ends: Ends, sender: PeerProcess, number: signal.Signals, seed: int) -> None:
    rng = random.Random(seed)
    num_frames = ends.proxy.seen("frame")
    descriptors = chaos.num_descriptors()
    reservation = ends.reserve(TOKENS, rng)
    strike(ends, num_frames, rng, sender.pid, number)
    await sender.tell(ticket=reservation.ticket.hex(), attempt=1)
    async with asyncio.timeout(PATIENCE):
        while not ends.attempts:
            await asyncio.sleep(0.01)
    await settled(ends.attempts, descriptors)
    ends.proxy.spare()
    assert ends.applied == []
    await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.applied == [77]
    assert ends.arrived(reservation)
    if number is signal.SIGSTOP:
        os.kill(sender.pid, signal.SIGCONT)
        assert (await sender.answer())["error"] == "UnavailableError"
        assert (await sender.ask(ticket=reservation.ticket.hex(), attempt=3))["error"] == "NotFoundError"
        assert ends.arrived(reservation)


@pytest.mark.parametrize(("number", "seed"), STRIKES)
async def test_the_receiver_is_lost(ends: Ends, receiver: PeerProcess, number: signal.Signals, seed: int) -> None:
    rng = random.Random(seed)
    descriptors = chaos.num_descriptors()
    await transfer(ends, await ticket_of(receiver))
    num_frames = ends.proxy.seen("frame")
    ticket = await ticket_of(receiver)
    strike(ends, num_frames, rng, receiver.pid, number)
    with pytest.raises(UnavailableError):
        await transfer(ends, ticket)
    ends.proxy.spare()
    await settled((), descriptors)
    if number is signal.SIGSTOP:
        os.kill(receiver.pid, signal.SIGCONT)
        await transfer(ends, ticket, attempt=2)
        state = await receiver.ask()
        assert state["applied"] == [77, 77]
        assert state["tickets"] == 0


async def ticket_of(receiver: PeerProcess) -> bytes:
    return bytes.fromhex((await receiver.ask(reserve=True))["ticket"])


async def transfer(ends: Ends, ticket: bytes, attempt: int = 1) -> None:
    """To the other process, whose ticket it is."""
    reservation = ends.reserve(TOKENS, random.Random(1))
    ends.book.close(reservation)
    reservation.ticket = ticket
    await ends.send(reservation, ends.compute(TOKENS), attempt)
