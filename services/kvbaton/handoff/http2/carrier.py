"""The thin shell: an endpoint's bytes between its state machine and a non-blocking socket, on an asyncio loop.

Payloads cross it without being copied: out of the caller's buffers by `sendmsg`, into their places by `recvmsg_into`.
No task runs here, only callbacks, each of which does a bounded amount of work.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable

from kvbaton.handoff.http2.endpoint import Endpoint
from kvbaton.handoff.http2.frames import Code, ConnectionFault
from kvbaton.handoff.http2.messages import MAX_BUFFERS
from kvbaton.handoff.http2.rules import FrameRules

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PING_AFTER_TICKS = 20
"""As `rpc.serving`: what was silent for so long is asked for a sign of life."""
GONE_AFTER_TICKS = 10
"""And is gone when it gives none for so long. Within a frame, and while it takes nothing of what is due, it is not
even asked. Ticks are counted instead of time: a process that was stopped itself must not take its peers for silent."""

READS_PER_CALLBACK = 8
WRITE_BYTES_PER_CALLBACK = 4 << 20
MAX_OUT_BYTES = 1 << 20
"""Most bytes of frames other than data that wait for a peer to read."""

_SPARE_BYTES = 64 << 10
_SPARE_BETWEEN_FRAMES = 2048
"""What comes after a frame is mostly the start of a message whose rest has a place of its own, and is not copied."""
_ZEROS = memoryview(bytes(1 << 20))


class FrameJob:
    """A DATA frame on its way into the kernel."""

    def __init__(self, header: bytes, payload: list[memoryview], size: int) -> None:
        """`payload` has `size` bytes together."""
        self.buffers = [memoryview(header), *payload]
        self.left = len(header) + size
        self._size = size
        self._waiter: asyncio.Future[None] | None = None

    @property
    def header_left(self) -> int:
        """How much of the frame's header is still to be sent."""
        return max(0, self.left - self._size)

    async def wait(self) -> None:
        """Until the kernel has all of it, or the connection is lost."""
        if self.left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def finish(self) -> None:
        """Nothing of it is left to be sent, or ever will be."""
        self.left, self.buffers = 0, []
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Carrier:
    """Moves one connection's bytes until it is lost."""

    def __init__(self, connected: socket.socket, endpoint: Endpoint, on_lost: Callable[[], object]) -> None:
        """Takes over a connected, non-blocking socket. `on_lost` is called once, after all streams have ended."""
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._endpoint = endpoint
        self._rules = FrameRules(endpoint)
        self._on_lost = on_lost
        self._jobs: deque[FrameJob] = deque()
        self._job: FrameJob | None = None
        self._iov: list[memoryview] = []
        self._due = 0
        """Bytes in `_iov`: control frames, then what is left of `_job`."""
        self._spare = memoryview(bytearray(_SPARE_BYTES))
        self._reading = False
        self._writer_added = False
        self._silent = self._stuck = 0
        with contextlib.suppress(OSError):
            # A UNIX socket has none.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(connected.fileno(), self._readable)
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self.flush()

    def submit(self, job: FrameJob) -> None:
        """Send a frame after those before it. Perhaps it has left already when this returns: `job.left` is then 0.

        Each stream has one job at a time, so that streams share the connection frame by frame.
        """
        self._jobs.append(job)
        self.flush()

    def abandon(self, job: FrameJob) -> bool:
        """Let go of a job's buffers now. Returns whether nothing of it was sent, nor will be.

        A frame that has begun must be completed, or nobody could read what follows: it is, with zeros.
        """
        if job is self._job:
            control = self._due - job.left
            if control == 0:
                kept = _first(self._iov, job.header_left)
                zeros = job.left - job.header_left
                self._iov = kept + [_ZEROS[: min(len(_ZEROS), zeros - at)] for at in range(0, zeros, len(_ZEROS))]
                return False
            self._iov, self._due, self._job = _first(self._iov, control), control, None
        elif job in self._jobs:
            self._jobs.remove(job)
        return job.left > 0

    def flush(self) -> None:
        """Write what is due, as far as the kernel takes it."""
        if not (self._reading or self._writer_added or self.closed):
            self._write()

    def close(self, code: Code, reason: str) -> None:
        """Say goodbye and end everything."""
        if not self.closed:
            self._endpoint.go_away(code, reason)
            self.flush()
            self._lose(reason)

    def _readable(self) -> None:
        self._reading = True
        try:
            for _ in range(READS_PER_CALLBACK):
                if not self._read():
                    break
        except ConnectionFault as fault:
            logger.warning("HTTP/2 peer %s broke the protocol: %s (%s)", self._peer(), fault, fault.code.name)
            self._end(fault.code, str(fault))
        except Exception:
            logger.exception("an HTTP/2 connection failed")
            self._end(Code.INTERNAL_ERROR, "internal error")
        finally:
            self._reading = False
        self.flush()
        if len(self._endpoint.out) > MAX_OUT_BYTES:
            self._end(Code.ENHANCE_YOUR_CALM, "answers are not read")

    def _read(self) -> bool:
        """Receive once; False when nothing more is there, or ever will be."""
        reader, spare = self._rules.reader, self._spare
        places = reader.direct()
        placed = 0
        if not places:
            if reader.num_left < _SPARE_BETWEEN_FRAMES:
                spare = spare[:_SPARE_BETWEEN_FRAMES]
            count = self._receive([spare])
        else:
            spare = spare[:_SPARE_BETWEEN_FRAMES]
            placed = sum(map(len, places))
            try:
                with reader.guard:
                    count = self._receive([*places, spare])
            except Exception as error:
                reader.refuse(error)
                return True
        if count <= 0:
            return False
        self._silent = 0
        if placed:
            reader.landed(min(count, placed))
        if count > placed:
            reader.feed(spare[: count - placed])
        return not self.closed and count >= placed + len(spare)

    def _receive(self, buffers: list[memoryview]) -> int:
        """Bytes received; 0 when there are none now, or the connection has ended."""
        try:
            count = self._socket.recvmsg_into(buffers)[0]
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._lose(f"the connection was lost: {error.strerror or error}")
            return 0
        if count == 0:
            self._lose("the connection was closed by the peer")
        return count

    def _write(self) -> None:
        budget = WRITE_BYTES_PER_CALLBACK
        while budget > 0 and (self._due or self._fill()):
            buffers = self._iov if len(self._iov) <= MAX_BUFFERS else self._iov[:MAX_BUFFERS]
            try:
                count = self._socket.sendmsg(buffers)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._lose(f"the connection was lost: {error.strerror or error}")
                return
            self._stuck = 0
            budget -= count
            whole = buffers is self._iov and count == self._due
            self._sent(count)
            if not whole and buffers is self._iov:
                break
        self._watch(bool(self._due or self._jobs or self._endpoint.out))

    def _fill(self) -> bool:
        """Take up what is to be sent next; False for nothing."""
        out = self._endpoint.out
        if out:
            self._iov, self._due = [memoryview(bytes(out))], len(out)
            out.clear()
        if self._jobs:
            self._job = job = self._jobs.popleft()
            self._iov = [*self._iov, *job.buffers] if self._due else job.buffers
            self._due += job.left
        return self._due > 0

    def _sent(self, count: int) -> None:
        self._due -= count
        job = self._job
        if self._due == 0:
            self._iov = []
            if job is not None:
                self._job = None
                job.finish()
            return
        if job is not None:
            job.left = min(job.left, self._due)
        full = 0
        for buffer in self._iov:
            if count < len(buffer):
                break
            count -= len(buffer)
            full += 1
        self._iov = self._iov[full:]
        if count:
            self._iov[0] = self._iov[0][count:]

    def _watch(self, wanted: bool) -> None:
        if wanted != self._writer_added:
            self._writer_added = wanted
            if wanted:
                self._loop.add_writer(self._socket.fileno(), self._write)
            else:
                self._loop.remove_writer(self._socket.fileno())

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self._silent += 1
        self._stuck = self._stuck + 1 if self._writer_added else 0
        if self._stuck > GONE_AFTER_TICKS:
            self._end(Code.NO_ERROR, f"the peer took no byte for {GONE_AFTER_TICKS} s")
        elif self._silent > GONE_AFTER_TICKS and self._rules.reader.partial:
            self._end(Code.NO_ERROR, f"the peer sent nothing for {GONE_AFTER_TICKS} s within a frame")
        elif self._silent >= PING_AFTER_TICKS + GONE_AFTER_TICKS:
            self._end(Code.NO_ERROR, f"the peer answered no ping for {GONE_AFTER_TICKS} s")
        elif self._endpoint.going_away and not self._endpoint.streams:
            self.close(Code.NO_ERROR, "the peer has gone away")
        else:
            if self._silent == PING_AFTER_TICKS:
                self._endpoint.ping()
            self._rules.tick()
            self.flush()

    def _end(self, code: Code, reason: str) -> None:
        if not self.closed:
            logger.info("HTTP/2 connection with %s ends: %s", self._peer(), reason)
            self.close(code, reason)

    def _lose(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._watch(False)
        self._socket.close()
        jobs = [*self._jobs, *([self._job] if self._job is not None else [])]
        self._jobs.clear()
        self._iov, self._due, self._job = [], 0, None
        self._endpoint.lose_all(reason)
        for job in jobs:
            job.finish()
        self._on_lost()

    def _peer(self) -> str:
        return peer_name(self._socket)


def peer_name(connected: socket.socket) -> str:
    """host:port of the other end, for logs."""
    try:
        address = connected.getpeername()
    except OSError:
        return "(gone)"
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _first(buffers: list[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes."""
    taken = []
    for buffer in buffers:
        if size <= 0:
            break
        taken.append(buffer[:size])
        size -= len(buffer)
    return taken
