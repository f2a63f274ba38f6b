"""An event loop in a thread of its own, for KV: its megabyte messages must not delay the loop that streams tokens."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines on another thread's loop for callers on this one. Use as an async context manager."""

    def __init__(self, name: str, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._loop_factory = loop_factory
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop
        self._group: asyncio.TaskGroup
        self._stop: asyncio.Event

    async def __aenter__(self) -> "LoopThread":
        self._thread.start()
        await asyncio.wrap_future(self._ready)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and return its result, or raise its error; StoppedError when the thread is ending.

        When the caller is cancelled, `work` is cancelled and has ended before CancelledError comes out here: what it
        was using may then be freed.
        """
        outcome, cancel = self._begin(work)
        waiter = asyncio.wrap_future(outcome)
        cancelled: asyncio.CancelledError | None = None
        while not waiter.done():
            try:
                await asyncio.wait([waiter])
            except asyncio.CancelledError as error:
                cancelled = error
                cancel()
        if cancelled is not None:
            waiter.exception()
            raise cancelled
        return waiter.result()

    @asynccontextmanager
    async def running(self, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Let `work` run there for the length of the block; then it is cancelled, and has ended. Raises its error."""
        outcome, cancel = self._begin(work)
        try:
            yield
        finally:
            cancel()
            with suppress(StoppedError):
                await asyncio.wrap_future(outcome)

    def _begin(self, work: Coroutine[Any, Any, T]) -> "tuple[Future[T], Callable[[], None]]":
        """Where its outcome will be, and what cancels it. Raises StoppedError."""
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            settling = _settle(work, outcome)
            try:
                task = self._group.create_task(settling)
            except RuntimeError:
                # The group has ended meanwhile, and the loop is about to.
                settling.close()
                _abandon(work, outcome)
                return
            task.add_done_callback(lambda _: _abandon(work, outcome))
            tasks.append(task)

        try:
            # The caller's context goes along: it holds the trace that the KV stream belongs to.
            self._loop.call_soon_threadsafe(begin, context=contextvars.copy_context())
        except RuntimeError:
            work.close()
            raise StoppedError from None

        def cancel() -> None:
            # A loop that has ended has ended the work too.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

        return outcome, cancel

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with asyncio.TaskGroup() as self._group:
            self._ready.set_result(None)
            await self._stop.wait()


async def _settle(work: Coroutine[Any, Any, T], outcome: "Future[T]") -> None:
    # Whatever happens reaches the caller, and nothing reaches the task group, which others share.
    try:
        result = await work
    except asyncio.CancelledError:
        outcome.set_exception(StoppedError())
    except Exception as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(result)


def _abandon(work: Coroutine[Any, Any, T], outcome: "Future[T]") -> None:
    # A task that is cancelled before its first step never runs, and so settles nothing.
    work.close()
    if not outcome.done():
        outcome.set_exception(StoppedError())


class StoppedError(Exception):
    """Work was cancelled over there, or not begun, because the thread is ending."""


@asynccontextmanager
async def entered_on(thread: LoopThread, manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Hold `manager` open on the thread's loop for the length of the block."""
    value = await thread.call(_awaited(manager.__aenter__()))
    try:
        yield value
    finally:
        await thread.call(_awaited(manager.__aexit__(None, None, None)))


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable
