"""The engine in its own thread, and the handles by which RPC handlers follow their requests.

The thread alone touches the engine. Handlers send it commands through a bounded queue; it answers each step with one
wake-up of the event loop, however many requests the step moved.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from kvbaton.engine.core import Engine
from kvbaton.engine.counters import Counts, EngineCounters
from kvbaton.engine.errors import KvbatonError, OverloadedError, PreemptedError
from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.request import Request
from kvbaton.engine.result import StepResult, TokenSampled
from kvbaton.engine.scheduler import Limits, NewRequest
from kvbaton.handoff.clock import wall_seconds

logger = logging.getLogger(__name__)

_MAX_COMMANDS = 8192


class EngineFailedError(Exception):
    """The forward pass, or the engine itself, raised; the requests it was for end with INTERNAL."""


Event = Request | TokenSampled | list[TokenLogprobs] | Exception
"""What a handle is told: its admission, a token, logprobs of its prompt, or its end."""


@dataclass(slots=True)
class RequestHandle:
    """One request, as its RPC handler sees it. Belongs to the event loop.

    What waits here is bounded by the request's own max_tokens.
    """

    request_id: str
    on_first_token: Callable[[int], None] | None = None
    """Called on the engine's thread, before the loop hears of it."""
    request: Request | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, where asked for; all are there before the first token."""
    _tokens: list[TokenSampled] = field(default_factory=list)
    _error: Exception | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def admitted(self) -> Request:
        """Wait until the request has its blocks. Raises what ended it instead."""
        while self.request is None:
            await self._wait()
        return self.request

    async def next_tokens(self) -> list[TokenSampled]:
        """Wait for tokens and take all that have come. Raises what ended the request instead.

        That is PreemptedError where it was handed back; the tokens before it are all taken first.
        """
        while not self._tokens:
            await self._wait()
        tokens, self._tokens = self._tokens, []
        return tokens

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._changed.wait()

    def deliver(self, event: Event) -> None:
        """Event loop only: something happened to the request."""
        if isinstance(event, TokenSampled):
            self._tokens.append(event)
        elif isinstance(event, list):
            self.prompt_logprobs += event
        elif isinstance(event, Request):
            self.request = event
        else:
            self._error = event
        self._changed.set()


@dataclass(frozen=True, slots=True)
class _Command:
    """What the engine's thread is to do between two steps, and what to do instead when the engine has failed."""

    run: Callable[[], None]
    refuse: Callable[[Exception], object]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine's state between two steps."""

    counts: Counts
    limits: Limits
    num_free_blocks: int
    """Held by nobody, cached ones included."""
    num_cached_blocks: int
    counters: EngineCounters
    requests_finished: int
    requests_cancelled: int


class EngineThread:
    """Owns an engine and steps it while there is work. Use as a context manager."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is where the handles live."""
        self._engine = engine
        self._loop = loop
        # Bounded by `_send`; removals alone are always taken, since clean-up must neither wait nor fail.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._failure: EngineFailedError | None = None
        self._failed = asyncio.Event()
        self._handles: dict[str, RequestHandle] = {}
        self._num_finished = self._num_cancelled = 0
        self._running = True
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def __enter__(self) -> "EngineThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.put(_Command(self._stop, lambda _: self._stop()))
        self._thread.join()

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Wait for `stop`. Raises EngineFailedError when the engine fails first: the worker is then of no use."""
        async with asyncio.TaskGroup() as group:
            waits = {group.create_task(stop.wait()), group.create_task(self._failed.wait())}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if self._failure is not None:
            raise self._failure

    def submit(self, handle: RequestHandle, new: NewRequest) -> None:
        """Queue a request; its fate comes through `handle`, which has the same id.

        Raises OverloadedError when commands pile up.
        """

        def add() -> None:
            try:
                self._engine.scheduler.add(new, wall_seconds())
            except KvbatonError as error:
                self._loop.call_soon_threadsafe(handle.deliver, error)
            else:
                self._handles[handle.request_id] = handle

        self._send(add, lambda failure: self._loop.call_soon_threadsafe(handle.deliver, failure))

    def kv_received(self, request_id: str, first_token_id: int) -> None:
        """A request's KV is in place; any thread may call. Nothing happens if the request has gone."""

        def start() -> None:
            if request_id in self._handles:
                self._dispatch(self._engine.scheduler.kv_received(request_id, first_token_id, wall_seconds()))

        self._send(start, _ignore)

    def set_limits(self, limits: Limits) -> None:
        """Change what a step may carry, from the next one on. Raises OverloadedError when commands pile up."""

        def change() -> None:
            self._dispatch(self._engine.scheduler.set_limits(limits, wall_seconds()))

        self._send(change, _ignore)

    def remove(self, handle: RequestHandle, *, finished: bool) -> None:
        """End a request between two steps and free its blocks; an ended one is left as it is.

        `finished` says for the counters whether it ran to its end. Never raises: it is what clean-up calls.
        """

        def remove() -> None:
            if self._handles.get(handle.request_id) is not handle:
                return
            del self._handles[handle.request_id]
            self._engine.scheduler.remove(handle.request_id, wall_seconds())
            if finished:
                self._num_finished += 1
            else:
                self._num_cancelled += 1

        self._commands.put(_Command(remove, _ignore))

    async def snapshot(self, *, check: bool = False) -> Snapshot:
        """The engine's state as of the next moment between two steps.

        With `check`, raises AssertionError unless every block is accounted for; its time grows with the pool.
        """
        result: Future[Snapshot] = Future()

        def take() -> None:
            scheduler = self._engine.scheduler
            try:
                if check:
                    scheduler.check_integrity()
            except AssertionError as error:
                result.set_exception(error)
                return
            result.set_result(
                Snapshot(
                    scheduler.counts(),
                    scheduler.limits,
                    scheduler.pool.num_free,
                    scheduler.pool.num_cached,
                    replace(self._engine.counters),
                    self._num_finished,
                    self._num_cancelled,
                )
            )

        self._send(take, result.set_exception)
        # The engine's thread answers in any case: who goes meanwhile must not cancel the answer under its hands.
        return await asyncio.shield(asyncio.wrap_future(result))

    def _send(self, run: Callable[[], None], refuse: Callable[[Exception], object]) -> None:
        if self._failure is not None:
            raise self._failure
        if self._commands.qsize() >= _MAX_COMMANDS:
            raise OverloadedError(f"{_MAX_COMMANDS} commands wait for the engine")
        self._commands.put(_Command(run, refuse))

    def _stop(self) -> None:
        self._running = False

    def _main(self) -> None:
        try:
            self._run()
        except BaseException:
            # Nothing of the engine can be trusted now. Whoever waits is told, and the service ends (`serve_until`).
            # BaseException: a library's panic is one, and a thread that just ended would leave everybody waiting.
            logger.exception("the engine has failed; this worker serves nothing any more")
            self._failure = EngineFailedError("the engine has failed")
            ended: list[tuple[RequestHandle, Event]] = [(handle, self._failure) for handle in self._handles.values()]
            self._loop.call_soon_threadsafe(_deliver, ended)
            self._loop.call_soon_threadsafe(self._failed.set)
            self._refuse_commands()

    def _refuse_commands(self) -> None:
        """Take what still comes, until the end, so that nobody waits for an answer."""
        assert self._failure is not None
        while self._running:
            self._commands.get().refuse(self._failure)

    def _run(self) -> None:
        busy = False
        while self._running:
            self._run_commands(wait=not busy)
            # Before the batch is computed: peers can get ready for an admitted request meanwhile.
            self._dispatch(self._engine.admit(wall_seconds))
            result = self._engine.compute(wall_seconds)
            busy = result.worked
            self._dispatch(result)

    def _run_commands(self, wait: bool) -> None:
        try:
            command = self._commands.get(block=wait)
            while True:
                command.run()
                command = self._commands.get_nowait()
        except queue.Empty:
            pass

    def _dispatch(self, result: StepResult) -> None:
        handles = self._handles
        events: list[tuple[RequestHandle, Event]] = []
        for request in result.preempted:
            # It has left the engine; nothing is there any more for `remove` to end.
            handle = handles.pop(request.request_id)
            events.append((handle, PreemptedError(self._why_preempted())))
        events += [(handles[request.request_id], request) for request in result.admitted]
        events += [(handles[request.request_id], list(logprobs)) for request, logprobs in result.prompt_logprobs]
        for event in result.sampled:
            request = event.request
            handle = handles[request.request_id]
            if handle.on_first_token is not None and event.index == request.num_resumed:
                handle.on_first_token(event.token_id)
            events.append((handle, event))
        events += [(handles[request.request_id], error) for request, error in _explained(result)]
        if events:
            self._loop.call_soon_threadsafe(_deliver, events)

    def _why_preempted(self) -> str:
        limits = self._engine.scheduler.limits
        return "this worker ran out of KV blocks" if limits.max_decode_seqs else "this worker does not decode any more"


def _explained(result: StepResult) -> list[tuple[Request, Exception]]:
    """The requests that failed, and what their callers are told: of errors not made for them, no more than the kind."""
    failed: list[tuple[Request, Exception]] = []
    logged: set[int] = set()
    for request, error in result.failed:
        if isinstance(error, KvbatonError):
            failed.append((request, error))
            continue
        if id(error) not in logged:
            logged.add(id(error))
            logger.error("a step failed, for %s and others", request.request_id, exc_info=error)
        failed.append((request, EngineFailedError("the forward pass failed")))
    return failed


def _ignore(_: Exception) -> None:
    """For commands whose caller hears of a failure in another way."""


def _deliver(events: list[tuple[RequestHandle, Event]]) -> None:
    for handle, event in events:
        handle.deliver(event)
