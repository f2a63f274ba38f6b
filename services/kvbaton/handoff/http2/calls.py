"""A client's calls: what has come for one, and the stream that its caller holds."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
from opentelemetry.trace import Span

from kvbaton.engine.errors import KvbatonError
from kvbaton.engine.kv_store import Buffer
from kvbaton.handoff.http2.carrier import Carrier, FrameJob
from kvbaton.handoff.http2.endpoint import Endpoint
from kvbaton.handoff.http2.frames import END_STREAM, Code, Kind, pack_header
from kvbaton.handoff.http2.headers import Headers, parse_trailers
from kvbaton.handoff.http2.messages import MessageFault, MessageWriter, Placement
from kvbaton.handoff.http2.streams import Stream
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.rpc.interceptors import end_span

if TYPE_CHECKING:
    Failure = KvbatonError | TimeoutError

MAX_DATA_BYTES = (4 << 20) + (64 << 10)
"""Longest frame that is sent: how long another stream waits for its turn. A KV frame with what is around it fits."""

YIELD_BYTES = 4 << 20
"""What a stream sends to a kernel that takes everything, before others get their turn: about a millisecond's worth."""

STALL_SECONDS = 10.0
"""Longest wait for a peer to open its window."""


class StreamEndedError(Exception):
    """Nothing more can be sent: the stream has ended. `ClientStream.receive` says how."""


class ClientCall:
    """What has come for a call. Implements `StreamEvents`."""

    def __init__(self, peer: str, endpoint: Endpoint, stream: Stream, span: Span) -> None:
        """`peer` is host:port, for errors."""
        self.peer = peer
        self.stream = stream
        self.endpoint = endpoint
        self.messages: deque[bytes] = deque()
        """Bounded by the stream's window."""
        self.ended = False
        self.error: Failure | None = None
        """How it ended, where that was not OK."""
        self.deadline: asyncio.TimerHandle | None = None
        self.on_change: Callable[[], object] | None = None
        """Called when a message or the end has come."""
        self.on_credit: Callable[[], object] | None = None
        """Called when there is a reason to look at the window again."""
        self._span = span
        self._unreleased = 0

    def finish(self, code: grpc.StatusCode, message: str, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
        """The call has ended, for whatever reason; only the first counts."""
        if self.ended:
            return
        self.ended = True
        if self.deadline is not None:
            self.deadline.cancel()
        if code is not grpc.StatusCode.OK:
            status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), message)
            self.error = from_rpc_error(status, self.peer)
        end_span(self._span, code, message, failed=code is not grpc.StatusCode.OK)
        for told in (self.on_change, self.on_credit):
            if told is not None:
                told()

    def abort(self, code: grpc.StatusCode, message: str) -> None:
        """End it from this side."""
        if not self.ended:
            self.endpoint.reset(self.stream, Code.CANCEL)
            self.finish(code, message)

    def pop(self) -> bytes:
        """The first message that waits."""
        message = self.messages.popleft()
        self._release()
        return message

    def place(self, start: memoryview, size: int) -> Placement | None:
        """See `MessageListener`: answers are small."""
        return None

    def on_placed(self) -> None:
        """See `MessageListener`: nothing is placed."""

    def on_message(self, message: bytes) -> None:
        """See `MessageListener`."""
        self.messages.append(message)
        if self.on_change is not None:
            self.on_change()

    def on_bytes(self, count: int) -> None:
        """See `StreamEvents`."""
        self._unreleased += count
        self._release()

    def on_headers(self, headers: Headers, *, ended: bool) -> None:
        """See `StreamEvents`."""
        if ended:
            code, message, metadata = parse_trailers(headers)
            if not self.stream.local_done:
                self.endpoint.reset(self.stream, Code.NO_ERROR)
            self.finish(code, message, metadata)
            return
        status = dict(headers).get(":status", "none")
        if status != "200":
            self.abort(grpc.StatusCode.UNAVAILABLE, f"HTTP status {status[:10]}")

    def on_half_close(self) -> None:
        """See `StreamEvents`. Trailers have come before, or never will."""
        self.finish(grpc.StatusCode.UNKNOWN, "the stream ended without a status")

    def on_window(self) -> None:
        """See `StreamEvents`."""
        if self.on_credit is not None:
            self.on_credit()

    def on_failure(self, error: Exception) -> None:
        """See `StreamEvents`."""
        code = error.code if isinstance(error, MessageFault) else grpc.StatusCode.INTERNAL
        self.abort(code, str(error))

    def on_reset(self, code: Code, reason: str) -> None:
        """See `StreamEvents`."""
        self.finish(grpc.StatusCode.UNAVAILABLE, reason)

    def _release(self) -> None:
        # What nobody reads closes the window, and what is being read never does.
        if self._unreleased and not self.messages:
            count, self._unreleased = self._unreleased, 0
            self.endpoint.release(self.stream, count)


class ClientStream:
    """A call in progress: messages out, messages in. One task may send while another one receives."""

    def __init__(self, call: ClientCall, carrier: Carrier) -> None:
        self._call = call
        self._carrier = carrier
        self._half_closed = False
        self._eager = 0
        """Bytes sent since others had their turn."""

    @property
    def half_closed(self) -> bool:
        """Whether everything was sent, the last message included."""
        return self._half_closed

    @property
    def ended(self) -> bool:
        """Whether the call has ended; answers that came before may still wait to be received."""
        return self._call.ended

    @property
    def answered(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return bool(self._call.messages) or self._call.ended

    def on_answer(self, told: Callable[[], object] | None) -> None:
        """Call `told` when something can be received, as often as something comes; None for nobody any more."""
        self._call.on_change = told

    async def send(self, parts: Sequence[Buffer], *, last: bool = False) -> None:
        """Send one message, the parts' concatenation, without copying it; returns when the kernel has all of it.

        When this is cancelled the parts may be used again at once, and a message cut short ends the call. Raises
        StreamEndedError when the call has ended, also because the peer has taken nothing for ten seconds.
        """
        message = MessageWriter(parts)
        try:
            while message.left:
                if self._eager >= YIELD_BYTES:
                    self._eager = 0
                    await asyncio.sleep(0)
                size = await self._credit(message.left)
                payload = message.take(size)
                await self._send_frame(payload, size, last=last and not message.left)
        except asyncio.CancelledError:
            if message.begun:
                self.cancel()
            raise

    async def receive(self) -> bytes | None:
        """The next message; None when the call has ended with OK. To be awaited by one task at a time.

        Raises what the peer's status stands for (`rpc.errors`): UnavailableError also for a lost connection,
        TimeoutError for the call's deadline.
        """
        call = self._call
        while not call.messages:
            if call.ended:
                if call.error is not None:
                    raise call.error
                return None
            await self._wait("on_change")
        message = call.pop()
        self._carrier.flush()
        return message

    def cancel(self) -> None:
        """End the call, if it has not ended. Nothing more is sent of it."""
        self._call.abort(grpc.StatusCode.CANCELLED, "cancelled")
        self._carrier.flush()

    async def _credit(self, wanted: int) -> int:
        """Bytes of the next frame, as soon as the windows have room for any."""
        call = self._call
        while not call.ended:
            size = min(wanted, MAX_DATA_BYTES, call.endpoint.credit(call.stream))
            if size > 0:
                return size
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._wait("on_credit")
            except TimeoutError:
                call.abort(grpc.StatusCode.UNAVAILABLE, f"nothing was taken for {STALL_SECONDS:g} s")
                self._carrier.flush()
        raise StreamEndedError

    async def _wait(self, event: str) -> None:
        """Until the call's callback of this name is called."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = getattr(self._call, event)

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)
            if before is not None:
                before()

        setattr(self._call, event, wake)
        try:
            await waiter
        finally:
            setattr(self._call, event, before)

    async def _send_frame(self, payload: list[memoryview], size: int, *, last: bool) -> None:
        stream, endpoint = self._call.stream, self._call.endpoint
        if self._call.ended:
            raise StreamEndedError
        stream.send_window.take(size)
        endpoint.send_window.take(size)
        job = FrameJob(pack_header(size, Kind.DATA, END_STREAM if last else 0, stream.id), payload, size)
        self._carrier.submit(job)
        self._eager = 0 if job.left else self._eager + size
        try:
            await job.wait()
        except asyncio.CancelledError:
            if job.left:
                self._give_up(job, size)
            raise
        finally:
            if last and not job.left and not self._carrier.closed:
                self._half_closed = True
                endpoint.close_local(stream)

    def _give_up(self, job: FrameJob, size: int) -> None:
        if self._carrier.abandon(job):
            self._call.endpoint.send_window.grow(size)
        self.cancel()
