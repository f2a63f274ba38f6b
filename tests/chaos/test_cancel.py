"""Either side may give a request up at any frame: the other hears of it, nothing is applied, nothing stays held."""

import asyncio
import random

import pytest

from kvbaton.engine.errors import NotFoundError, TransferRejectedError
from support import chaos, faults
from support.chaos import TOKENS, Ends, settled
from support.fakes import PATIENCE
from support.fault_proxy import Passed, Passing
from support.http2_frames import grpc_message

SEEDS = range(6)


def place(rng: random.Random, num_frames: int) -> tuple[str, int]:
    """Any message of a transfer."""
    return rng.choice([("header", 0), ("commit", 0), *[("frame", rng.randrange(num_frames))] * 8])


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_decode_request_ends_meanwhile(ends: Ends, seed: int) -> None:
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    descriptors = chaos.num_descriptors()
    reservation = ends.reserve(TOKENS, rng)
    kind, number = place(rng, num_frames)
    ends.proxy.strike(faults.calling(kind, number, lambda: ends.book.close(reservation)))
    ended = NotFoundError if kind == "header" else TransferRejectedError
    with pytest.raises(ended, match="the request has ended|its request has ended"):
        await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == []
    assert len(ends.book) == 0
    assert ends.received.transfers_rejected == 0, "nobody's fault"
    ends.proxy.spare()
    await ends.undisturbed(rng)
    await settled(ends.attempts, descriptors)


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_prefill_request_is_cancelled(ends: Ends, seed: int) -> None:
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    descriptors = chaos.num_descriptors()
    reservation = ends.reserve(TOKENS, rng)
    reached = asyncio.Event()
    ends.proxy.strike(faults.calling(*place(rng, num_frames), reached.set))
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        sending = group.create_task(ends.send(reservation, ends.compute(TOKENS)))
        await reached.wait()
        sending.cancel()
    assert sending.cancelled()
    await settled(ends.attempts, descriptors)
    ends.proxy.spare()
    if ends.applied:
        # The last message had left: the receiver is right to go on, and whoever asked for it knows of the cancel.
        assert ends.arrived(reservation)
        return
    await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.arrived(reservation)
    assert ends.applied == [77]
    await settled(ends.attempts, descriptors)


async def test_a_crowd_of_transfers_with_and_without_faults(ends: Ends) -> None:
    """One connection, many streams: what strikes one of them leaves the others alone."""
    rng = random.Random(3)
    await ends.undisturbed(rng)
    descriptors = chaos.num_descriptors()
    ends.applied.clear()
    outgoing = ends.compute(TOKENS)
    # All of them send the same KV: the source is filled once.
    outgoings = [outgoing, *(ends.again(TOKENS) for _ in range(5))]
    reservations = [ends.reserve(TOKENS, rng) for _ in outgoings]
    # Blocks of their own.
    for index, reservation in enumerate(reservations):
        reservation.blocks = range(index * 16, index * 16 + 11)
    struck = {5, 17, 40}

    def edit(message: Passing) -> Passed:
        if message.kind == "frame" and message.number in struck:
            return Passed(grpc_message(faults.flipped(message.data, rng)))
        return Passed(grpc_message(message.data), delay=0.001)

    ends.proxy.strike(edit)
    results = await asyncio.gather(*map(ends.send, reservations, outgoings), return_exceptions=True)
    failed = [isinstance(result, TransferRejectedError) for result in results]
    assert 1 <= sum(failed) <= len(struck)
    assert len(ends.applied) == len(failed) - sum(failed)
    assert all(ends.arrived(reservation) or bad for reservation, bad in zip(reservations, failed, strict=True))
    assert len(ends.book) == sum(failed)
    await settled(ends.attempts, descriptors)
