"""Waiting for a device holds up no loop."""

import asyncio
import threading

import pytest

from kvbaton.handoff.pending import settled
from support.fakes import PATIENCE


class Work:
    """A `Pending` that a test ends, or lets fail."""

    def __init__(self, failure: RuntimeError | None = None) -> None:
        self.over = threading.Event()
        self.waits = 0
        self._failure = failure

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        self.waits += 1
        assert self.over.wait(PATIENCE)
        if self._failure is not None:
            raise self._failure


async def test_the_loop_goes_on_until_the_work_is_done() -> None:
    work = Work()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(settled(work))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        work.over.set()
    assert work.waits == 1


async def test_nothing_and_what_is_done_are_not_waited_for() -> None:
    work = Work()
    work.over.set()
    await settled(work)
    await settled(None)
    assert work.waits == 0


async def test_a_device_that_fails_is_heard_of() -> None:
    work = Work(RuntimeError("the device has failed"))
    asyncio.get_running_loop().call_soon(work.over.set)
    with pytest.raises(RuntimeError, match="the device has failed"):
        await settled(work)
