"""Work on another thread's loop: its result or error comes back, the caller's context goes along, and nobody who was
cancelled goes on before the work has ended.
"""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvbaton.worker.loop_thread import LoopThread, StoppedError, entered_on
from support.fakes import PATIENCE


@pytest.fixture
async def thread() -> AsyncIterator[LoopThread]:
    async with asyncio.timeout(PATIENCE), LoopThread("kv", asyncio.new_event_loop) as running:
        yield running


async def test_a_result_comes_back_from_the_other_thread(thread: LoopThread) -> None:
    async def work() -> tuple[str, bool]:
        return threading.current_thread().name, asyncio.get_running_loop() is here

    here = asyncio.get_running_loop()
    assert await thread.call(work()) == ("kv", False)


async def test_calls_run_side_by_side(thread: LoopThread) -> None:
    # The first ends only when the second has run.
    met: asyncio.Future[str] = await thread.call(_future())

    async def wait() -> str:
        return await met

    async def meet() -> None:
        met.set_result("met")

    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(thread.call(wait()))
        group.create_task(thread.call(meet()))
    assert waiting.result() == "met"


async def _future() -> "asyncio.Future[str]":
    return asyncio.get_running_loop().create_future()


async def test_an_error_comes_back_and_harms_nobody_else(thread: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("broken")

    async def work() -> int:
        return 3

    with pytest.raises(ValueError, match="broken"):
        await thread.call(fail())
    assert await thread.call(work()) == 3


async def test_the_callers_context_goes_along(thread: LoopThread) -> None:
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")

    async def work() -> str:
        seen = trace.get()
        trace.set("changed there")
        return seen

    trace.set("mine")
    assert await thread.call(work()) == "mine"
    assert trace.get() == "mine"


class Cleanup:
    """Work that, when it is cancelled, takes until the test allows it to end."""

    def __init__(self) -> None:
        self.running, self.cleaning, self.may_end = threading.Event(), threading.Event(), threading.Event()
        self.ended = False

    async def work(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cleaning.set()
            try:
                await asyncio.to_thread(self.may_end.wait, PATIENCE)
            finally:
                self.ended = True


@pytest.mark.parametrize("twice", [False, True])
async def test_a_cancelled_caller_waits_for_the_works_end(thread: LoopThread, twice: bool) -> None:
    cleanup = Cleanup()
    ended_before_caller: list[bool] = []

    async def caller() -> None:
        try:
            await thread.call(cleanup.work())
        finally:
            ended_before_caller.append(cleanup.ended)

    async with asyncio.TaskGroup() as group:
        calling = group.create_task(caller())
        assert await asyncio.to_thread(cleanup.running.wait, PATIENCE)
        calling.cancel()
        assert await asyncio.to_thread(cleanup.cleaning.wait, PATIENCE)
        assert not calling.done()
        if twice:
            # The work is told once more, and its clean-up is cut short; the caller waits for that, too.
            calling.cancel()
        cleanup.may_end.set()
    assert calling.cancelled()
    assert ended_before_caller == [True]


async def test_a_caller_cancelled_as_the_work_fails_is_cancelled(thread: LoopThread) -> None:
    running = threading.Event()

    async def work() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("broken while it was cleaning up") from None

    async with asyncio.TaskGroup() as group:
        calling = group.create_task(thread.call(work()))
        assert await asyncio.to_thread(running.wait, PATIENCE)
        calling.cancel()
    assert calling.cancelled()


async def test_work_whose_caller_is_cancelled_before_it_begins_never_runs(thread: LoopThread) -> None:
    async def work() -> None:
        pytest.fail("it began")

    async def block() -> None:
        held.set()
        assert release.wait(PATIENCE)

    held, release = threading.Event(), threading.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(thread.call(block()))
        assert await asyncio.to_thread(held.wait, PATIENCE)
        calling = group.create_task(thread.call(work()))
        await asyncio.sleep(0)
        calling.cancel()
        await asyncio.sleep(0)
        release.set()
    assert calling.cancelled()


async def test_work_that_is_cancelled_over_there_is_an_error_here(thread: LoopThread) -> None:
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    with pytest.raises(StoppedError):
        await thread.call(work())


async def test_leaving_waits_for_running_work() -> None:
    running, may_end = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def work() -> str:
        running.set()
        await asyncio.to_thread(may_end.wait, PATIENCE)
        return "done"

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        async with LoopThread("kv", asyncio.new_event_loop) as thread:
            calling = group.create_task(thread.call(work()))
            assert await asyncio.to_thread(running.wait, PATIENCE)
            loop.call_soon(may_end.set)
        assert not any(alive.name == "kv" for alive in threading.enumerate())
        assert await calling == "done"


async def test_a_call_after_the_end_is_refused() -> None:
    async def work() -> None:
        pytest.fail("nothing runs any more")

    async with LoopThread("kv", asyncio.new_event_loop) as thread:
        pass
    with pytest.raises(StoppedError):
        await thread.call(work())


async def test_a_manager_is_entered_and_left_over_there(thread: LoopThread) -> None:
    log: list[tuple[str, str]] = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[int]:
        log.append(("enter", threading.current_thread().name))
        yield 7
        log.append(("exit", threading.current_thread().name))

    async def leave_by_an_error() -> None:
        async with entered_on(thread, manager()) as value:
            assert (value, log) == (7, [("enter", "kv")])
            raise KeyError

    with pytest.raises(KeyError):
        await leave_by_an_error()
    assert log == [("enter", "kv"), ("exit", "kv")]


async def test_what_runs_for_the_length_of_a_block_has_ended_after_it(thread: LoopThread) -> None:
    seen: list[str] = []
    begun = threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(threading.current_thread().name)

    async with thread.running(work()):
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        assert seen == []
    assert seen == ["kv"]


async def test_what_has_failed_there_is_raised_at_the_end(thread: LoopThread) -> None:
    begun = threading.Event()

    async def work() -> None:
        begun.set()
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        async with thread.running(work()):
            await asyncio.to_thread(begun.wait, PATIENCE)
