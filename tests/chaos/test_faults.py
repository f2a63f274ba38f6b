"""Whatever happens to a transfer on its way ends in the right error, within its time, with nothing applied and nothing
held; and the ticket is good for another attempt.
"""

import contextlib
import dataclasses
import random

import pytest

from kvbaton.engine.errors import NotFoundError, UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff import conversation as conversation_module
from support import chaos, faults
from support.chaos import TOKENS, Ends, settled
from support.fault_proxy import Passed, Passing, Then, unchanged
from support.faults import FAULTS, Fault
from support.http2_frames import grpc_message

SEEDS = range(2)


WIDE = KvGeometry((LayerGeometry(8, 32, 32),) * 4, "float32")
"""8 KiB a token."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_fault_ends_in_its_error_and_leaves_nothing(
    ends: Ends, fault: Fault, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    assert num_frames > 10
    descriptors = chaos.num_descriptors()
    reservation = ends.reserve(TOKENS, rng)
    ends.proxy.strike(fault.make(rng, num_frames), responses=fault.responses)
    with monkeypatch.context() as patch:
        if fault.silent:
            patch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.3)
        with pytest.raises(fault.error, match=fault.message):
            await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == ([77] if fault.applied else [])
    assert ends.arrived(reservation) or not fault.applied
    assert len(ends.book) == (not fault.applied)

    ends.proxy.spare()
    ends.applied.clear()
    if fault.applied:
        reservation = ends.reserve(TOKENS, rng)
    async with ends.reconnected() if fault.frozen else contextlib.nullcontext():
        await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.arrived(reservation)
    assert ends.applied == [77]
    assert len(ends.book) == 0
    if fault.frozen:
        # What is still on its way comes after all, to blocks that are somebody else's by now.
        ends.proxy.thaw()
    await settled(ends.attempts, descriptors)
    assert ends.arrived(reservation)


@pytest.mark.parametrize("ticket", ["forged", "used", "closed"])
async def test_a_ticket_is_good_for_one_request(ends: Ends, ticket: str) -> None:
    rng = random.Random(ticket)
    await ends.undisturbed(rng)
    reservation = ends.reserve(TOKENS, rng)
    match ticket:
        case "forged":
            reservation = dataclasses.replace(reservation, ticket=rng.randbytes(16))
        case "used":
            await ends.send(reservation, ends.compute(TOKENS))
        case "closed":
            ends.book.close(reservation)
    ends.applied.clear()
    num_writes = len(ends.sink.writes)
    for attempt in (1, 2, 3):
        with pytest.raises(NotFoundError, match="the ticket is unknown here, used, or its request has ended"):
            await ends.send(reservation, ends.compute(TOKENS), attempt)
    assert ends.applied == []
    assert len(ends.sink.writes) == num_writes


async def test_a_transfer_that_was_listened_to_cannot_be_replayed(ends: Ends) -> None:
    rng = random.Random(5)
    heard = bytearray()

    def listen(message: Passing) -> Passed:
        heard.extend(grpc_message(message.data))
        return unchanged(message)

    def replay(message: Passing) -> Passed:
        return Passed(bytes(heard)) if message.kind == "header" else Passed(b"")

    reservation = ends.reserve(TOKENS, rng)
    ends.proxy.strike(listen)
    await ends.send(reservation, ends.compute(TOKENS))
    ends.proxy.strike(replay)
    other = ends.reserve(TOKENS, rng)
    with pytest.raises(NotFoundError):
        await ends.send(other, ends.compute(TOKENS))
    assert ends.applied == [77]
    assert len(ends.book) == 1


async def test_an_attempt_that_was_replaced_writes_nothing_more(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rest arrives when the next attempt has begun, and once more when that one was applied."""
    rng = random.Random(7)
    num_frames = await ends.undisturbed(rng)
    descriptors = chaos.num_descriptors()
    reservation = ends.reserve(TOKENS, rng)
    ends.proxy.strike(faults.at("frame", num_frames // 2, lambda data: Passed(grpc_message(data), Then.FREEZE)))
    with monkeypatch.context() as patch:
        patch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.3)
        with pytest.raises(UnavailableError, match="gave no answer"):
            await ends.send(reservation, ends.compute(TOKENS))
    assert len(ends.attempts) == 1

    def thaw_in_the_middle(message: Passing) -> Passed:
        if message.kind == "frame" and message.number == num_frames // 3:
            ends.proxy.thaw()
        return Passed(grpc_message(message.data), delay=0.01)

    ends.proxy.strike(thaw_in_the_middle)
    async with ends.reconnected():
        await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.applied == [77]
    assert ends.arrived(reservation)
    await settled(ends.attempts, descriptors)
    assert ends.arrived(reservation)


@pytest.mark.parametrize("frame_bytes", [32 << 10])
async def test_a_slow_wire_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.5)
    tokens = range(128)
    async with chaos.ends(WIDE) as ends:
        reservation = ends.reserve(tokens, random.Random(11))
        # In all, twice as long as anybody waits for an answer.
        ends.proxy.strike(lambda message: Passed(grpc_message(message.data), delay=0.03))
        await ends.send(reservation, ends.compute(tokens))
        assert ends.proxy.seen("frame") > 30
        assert ends.arrived(reservation)
        assert ends.applied == [77]
