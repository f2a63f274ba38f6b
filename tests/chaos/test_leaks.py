"""Transfers leave nothing behind: after many of them descriptors, mappings, shared memory and RAM are as before."""

import gc
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import pytest

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.choice import GRPC, SHARED_MEMORY
from support import chaos
from support.chaos import Ends
from support.linked_ends import linked_ends

SMALLEST = KvGeometry((LayerGeometry(1, 1, 1),), "float32")
TOKENS = range(1)
WARM_UP = 200
GROWTH_BYTES = 4 << 20
"""What the heap may move by, whatever the number of transfers: pieces of it are in use here now and there then."""


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds."""

    descriptors: int
    mappings: int
    """Areas of its memory."""
    shared: int
    """Those that are shared with other processes, or could be."""
    resident: int

    @staticmethod
    def now() -> "Held":
        gc.collect()
        mappings = chaos.mappings()
        shared = sum(1 for line in mappings if line.split()[1].endswith("s"))
        return Held(chaos.num_descriptors(), len(mappings), shared, chaos.resident_bytes())


async def transfer(ends: Ends, transport: str, count: int, rng: random.Random) -> None:
    for _ in range(count):
        reservation = ends.reserve(TOKENS, rng)
        report = await ends.send(reservation, ends.compute(TOKENS))
        assert report.choice.transport == transport
        assert ends.arrived(reservation)
    assert ends.applied == [77] * count
    ends.applied.clear()
    ends.sink.writes.clear()
    ends.source.writes.clear()


TRANSPORTS: dict[str, Callable[..., AbstractAsyncContextManager[Ends]]] = {GRPC: chaos.ends, SHARED_MEMORY: linked_ends}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.leaks)])
async def test_many_transfers_leave_nothing(count: int, transport: str) -> None:
    rng = random.Random(0)
    async with TRANSPORTS[transport](SMALLEST, direct=True) as ends:
        await transfer(ends, transport, WARM_UP, rng)
        before = Held.now()
        await transfer(ends, transport, count, rng)
        after = Held.now()
        assert after.descriptors <= before.descriptors
        assert after.shared <= before.shared
        # The allocator's arenas come and go; a mapping for each transfer would be many more.
        assert after.mappings <= before.mappings + 8
        assert after.resident <= before.resident + GROWTH_BYTES
        assert len(ends.attempts) == len(ends.book) == 0
