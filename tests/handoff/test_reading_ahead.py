"""Payloads come in order; the next one is begun before one is sent, and its buffer is given back after it was."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from kvbaton.engine.kv_store import Reading
from kvbaton.handoff.frames import Rectangle
from kvbaton.handoff.reading_ahead import ReadingAhead
from kvbaton.handoff.sender import OutgoingTransfer
from support.fakes import GEOMETRY, PATIENCE, FakeStore

BLOCKS = [0, 1, 2, 3]
LAYERS = range(GEOMETRY.num_layers)
FRAMES = [Rectangle(LAYERS, range(4 * n, 4 * n + 4)) for n in range(3)]


class Ready:
    """Rectangles of which some are ready; more come when a test says so."""

    blocks: Sequence[int] = BLOCKS

    def __init__(self, ready: Sequence[Rectangle], later: Sequence[Rectangle | None] = (None,)) -> None:
        self.ready, self.later = list(ready), list(later)

    async def next(self) -> Rectangle | None:
        await asyncio.sleep(0)
        return self.next_ready() or self.later.pop(0)

    def next_ready(self) -> Rectangle | None:
        return self.ready.pop(0) if self.ready else None


class Device(FakeStore):
    """A store whose readings take as long as a test says."""

    def __init__(self) -> None:
        super().__init__()
        for layer in LAYERS:
            self.fill(layer, BLOCKS, range(16))
        self.log: list[str] = []
        self.copied = threading.Event()
        self.copied.set()

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        name = str(tokens.start)
        self.log.append(f"begin {name}")
        return Reading(self.read(layers, blocks, tokens), self, lambda: self.log.append(f"release {name}"))

    def done(self) -> bool:
        return self.copied.is_set()

    def wait(self) -> None:
        self.log.append("wait")
        assert self.copied.wait(PATIENCE)


async def test_the_next_is_begun_before_one_is_sent_and_released_after() -> None:
    store = Device()
    reading = ReadingAhead(store, Ready(FRAMES))
    for number, frame in enumerate(FRAMES):
        found = await reading.next()
        assert found is not None
        assert found[0] == frame
        assert b"".join(found[1]) == store.content(BLOCKS, frame.tokens)
        store.log.append(f"send {4 * number}")
    assert await reading.next() is None
    order = ["begin 0", "begin 4", "send 0", "release 0", "begin 8", "send 4", "release 4", "send 8", "release 8"]
    assert store.log == order


async def test_what_the_host_reads_by_itself_is_not_read_ahead() -> None:
    rectangles = Ready(FRAMES)
    reading = ReadingAhead(FakeStore(), rectangles)
    await reading.next()
    assert rectangles.ready == FRAMES[1:]


async def test_what_is_not_ready_is_waited_for() -> None:
    store = Device()
    reading = ReadingAhead(store, Ready(FRAMES[:1], later=[FRAMES[1], None]))
    for frame in FRAMES[:2]:
        found = await reading.next()
        assert found is not None
        assert found[0] == frame
    assert await reading.next() is None
    assert store.log == ["begin 0", "release 0", "begin 4", "release 4"]


async def test_a_payload_is_handed_out_when_the_device_has_copied_it_and_the_loop_goes_on() -> None:
    store = Device()
    store.copied.clear()
    reading = ReadingAhead(store, Ready(FRAMES))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(reading.next())
        while "wait" not in store.log:
            await asyncio.sleep(0.001)
        assert not waiting.done()
        assert store.log[:2] == ["begin 0", "begin 4"], "the next copy waits for nobody"
        store.copied.set()


@pytest.mark.parametrize("first_token", [None, 5])
async def test_a_transfer_tells_what_is_ready_without_waiting(first_token: int | None) -> None:
    outgoing = OutgoingTransfer(GEOMETRY, range(12))
    assert outgoing.next_ready() is None
    outgoing.cached(12, BLOCKS)
    if first_token is not None:
        outgoing.first_token(first_token)
    assert outgoing.next_ready() == Rectangle(LAYERS, range(12))
    assert outgoing.next_ready() is None
