"""The prefill side of a transfer: KV leaves layer by layer while the forward pass still runs.

`OutgoingTransfer` is told by the engine's thread what is ready; `send` runs on the event loop that KV has to itself,
copies from blocks that stay held until it returns, and is paced by HTTP/2 flow control: what waits is a few numbers,
not bytes.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from kvbaton.engine.errors import NotFoundError, TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import KvStore
from kvbaton.handoff import wire
from kvbaton.handoff.clock import wall_ns
from kvbaton.handoff.codec import RunningDigest, crc32c, encode_frame, encode_message
from kvbaton.handoff.frames import FramePlanner, Rectangle
from kvbaton.handoff.reading_ahead import ReadingAhead
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types

logger = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[bytes, pb.TransferResponse]
METHOD = "/kvbaton.v1.KvTransferService/Transfer"

# While the prompt is being computed nothing moves on the stream, so only the answers to what was sent are timed.
ANSWER_TIMEOUT_SECONDS = 10.0
"""Longest wait for the receiver's Ready and Applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where KV goes."""

    endpoint: str
    ticket: bytes
    attempt: int
    tokens: range
    """Tokens whose KV the receiver lacks."""


@dataclass(slots=True)
class SenderCounters:
    """Totals since start."""

    kv_bytes_sent: int = 0
    transfers_applied: int = 0
    transfers_rejected: int = 0


@dataclass(slots=True)
class TransferReport:
    """What one transfer moved. Times are Unix nanoseconds; 0 where the event never came."""

    payload_bytes: int = 0
    frames: int = 0
    first_frame_ns: int = 0
    computed_ns: int = 0
    applied_ns: int = 0

    @property
    def seconds(self) -> float:
        """From the first frame's departure to Applied."""
        return max(0, self.applied_ns - self.first_frame_ns) / 1e9

    @property
    def overlapped_share(self) -> float:
        """The part of `seconds` that passed before the forward pass was done, 0 to 1."""
        whole = self.applied_ns - self.first_frame_ns
        hidden = min(self.computed_ns, self.applied_ns) - self.first_frame_ns
        return min(1.0, max(0.0, hidden / whole)) if whole > 0 else 0.0


class OutgoingTransfer:
    """Progress of one request's KV, written by the engine's thread and read by the sender's loop."""

    def __init__(self, geometry: KvGeometry, tokens: range) -> None:
        """`tokens` are those that the receiver lacks."""
        self.report = TransferReport()
        self.blocks: Sequence[int] = ()
        self.first_token_id: int | None = None
        self._num_layers = geometry.num_layers
        self._planner = FramePlanner(geometry, tokens.start, tokens.stop)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._wake_pending = False

    def layer_ready(self, layer: int, stop: int, blocks: Sequence[int]) -> None:
        """Engine's thread: tokens below `stop` of `layer` are in `blocks`."""
        with self._lock:
            self.blocks = blocks
            self._planner.advance(layer, stop)
            self._wake()

    def cached(self, stop: int, blocks: Sequence[int]) -> None:
        """Any thread: tokens below `stop` of every layer were in `blocks` from the start."""
        with self._lock:
            self.blocks = blocks
            for layer in range(self._num_layers):
                self._planner.advance(layer, stop)
            self._wake()

    def first_token(self, token_id: int) -> None:
        """Engine's thread: the prompt is computed and its first token sampled."""
        with self._lock:
            self.report.computed_ns = wall_ns()
            self.first_token_id = token_id
            self._wake()

    def begin(self, window_start: int) -> None:
        """Sender's loop, before the first `next`: layers with a sliding window leave out what comes before.

        Raises ValueError when that is not within the tokens to send.
        """
        with self._lock:
            self._planner.begin(window_start)

    def attach(self) -> None:
        """Sender's loop: changes are announced here from now on."""
        with self._lock:
            self._loop = asyncio.get_running_loop()

    async def next(self) -> Rectangle | None:
        """Sender's loop: the next rectangle to send; None when all was handed out and the first token is known."""
        while True:
            with self._lock:
                self._changed.clear()
                self._wake_pending = False
                rectangle = self._planner.next()
                if rectangle is not None:
                    return rectangle
                if self._planner.all_sent and self.first_token_id is not None:
                    return None
            await self._changed.wait()

    def next_ready(self) -> Rectangle | None:
        """Sender's loop: the next rectangle, if it is worth a frame now."""
        with self._lock:
            return self._planner.next()

    def _wake(self) -> None:
        # One wake-up is enough for any number of layers; each costs a system call.
        if self._loop is not None and not self._wake_pending:
            self._wake_pending = True
            self._loop.call_soon_threadsafe(self._changed.set)


class KvSender:
    """Sends transfers from one store."""

    def __init__(
        self,
        store: KvStore,
        fingerprint: types.ModelFingerprint,
        host: types.HostIdentity,
        counters: SenderCounters,
    ) -> None:
        """`fingerprint` and `host` are this worker's own; `store` is encoded as its payloads shall be."""
        self._store = store
        self._fingerprint = fingerprint
        self._host = host
        self._counters = counters

    @property
    def geometry(self) -> KvGeometry:
        """That of what travels."""
        return self._store.geometry

    async def send(
        self, channel: grpc.aio.Channel, target: Target, outgoing: OutgoingTransfer, timeout: float | None
    ) -> TransferReport:
        """Move everything to `target` and return once it was applied. `timeout` is the request's, in seconds.

        Raises TransferRejectedError, NotFoundError (ticket), UnavailableError (receiver lost) or TimeoutError.
        """
        outgoing.attach()
        method: Any = channel.stream_stream(METHOD, response_deserializer=pb.TransferResponse.FromString)
        call: Call = method(timeout=timeout)
        header = encode_message(self._header(target))
        try:
            ready = (await self._exchange(call, target, "ready", lambda: call.write(header))).ready
            try:
                outgoing.begin(ready.window_start)
            except ValueError as error:
                raise UnavailableError(f"decode worker {target.endpoint} answered {error}") from error
            await self._exchange(call, target, "applied", lambda: self._frames(call, target, outgoing))
            outgoing.report.applied_ns = wall_ns()
            self._counters.transfers_applied += 1
            # To the stream's own end, so that nobody takes it for a cancelled one. Nothing can fail any more.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    await _read(call)
        finally:
            call.cancel()
        return outgoing.report

    async def _exchange(
        self, call: "Call", target: Target, expected: str, write: Callable[[], Coroutine[Any, Any, None]]
    ) -> pb.TransferResponse:
        """Write, and read the answer all the while: a receiver that refuses or vanishes is noticed at once.

        If nobody were reading when a write to an ended stream fails, the receiver's reason would be lost.
        """
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(_until_ended(write))
            answering = group.create_task(_read(call))
            await asyncio.wait({writing, answering}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({answering}, timeout=ANSWER_TIMEOUT_SECONDS)
            in_time = answering.done()
            if in_time and not answering.cancelled() and _is(answering.result(), expected):
                # What is answered has left; the call that wrote it returns a moment later.
                await asyncio.wait({writing}, timeout=ANSWER_TIMEOUT_SECONDS)
            writing.cancel()
            answering.cancel()
        peer = f"decode worker {target.endpoint}"
        if answering.cancelled():
            problem = "the connection was closed" if in_time else f"gave no answer for {ANSWER_TIMEOUT_SECONDS:.0f} s"
            raise UnavailableError(f"{peer}: {problem}")
        answer = answering.result()
        if isinstance(answer, grpc.aio.AioRpcError) and call.time_remaining() == 0:
            # Not the status: where the deadline meets a write, gRPC says INTERNAL.
            raise TimeoutError(f"{peer}: deadline exceeded") from answer
        checked = self._check(answer, expected, peer)
        if writing.cancelled():
            raise UnavailableError(f"{peer} answered {expected} before everything was sent")
        return checked

    async def _frames(
        self,
        call: "Call",
        target: Target,
        outgoing: OutgoingTransfer,
    ) -> None:
        digest, report = RunningDigest(), outgoing.report
        payloads = ReadingAhead(self._store, outgoing)
        while (payload := await payloads.next()) is not None:
            rectangle, parts = payload
            layers, tokens = rectangle.layers, rectangle.tokens
            info = pb.FrameInfo(
                number=report.frames,
                attempt=target.attempt,
                layer_start=layers.start,
                layer_stop=layers.stop,
                token_start=tokens.start,
                token_stop=tokens.stop,
                crc32c=crc32c(parts),
            )
            digest.add(info)
            report.first_frame_ns = report.first_frame_ns or wall_ns()
            await call.write(encode_frame(info, parts))
            size = sum(len(part) for part in parts)
            report.frames += 1
            report.payload_bytes += size
            self._counters.kv_bytes_sent += size
        assert outgoing.first_token_id is not None
        commit = pb.KvCommit(
            first_token_id=outgoing.first_token_id,
            num_frames=report.frames,
            payload_bytes=report.payload_bytes,
            digest=digest.value(outgoing.first_token_id),
        )
        await call.write(encode_message(commit))
        await call.done_writing()

    def _check(
        self, answer: pb.TransferResponse | grpc.aio.AioRpcError | None, expected: str, peer: str
    ) -> pb.TransferResponse:
        if isinstance(answer, grpc.aio.AioRpcError):
            if answer.code() is grpc.StatusCode.NOT_FOUND:
                raise NotFoundError(f"{peer}: {answer.details()}") from answer
            if answer.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"{peer}: {answer.details()}") from answer
            raise UnavailableError(f"{peer}: {answer.details()}") from answer
        if answer is None:
            raise UnavailableError(f"{peer} ended the transfer without an answer")
        if answer.HasField("rejected"):
            self._counters.transfers_rejected += 1
            raise TransferRejectedError(f"{peer}: {answer.rejected.reason}")
        if not _is(answer, expected):
            raise UnavailableError(f"{peer} answered {answer.WhichOneof('message')} where {expected} must come")
        return answer

    def _header(self, target: Target) -> pb.KvHeader:
        return pb.KvHeader(
            ticket=target.ticket,
            attempt=target.attempt,
            fingerprint=self._fingerprint,
            geometry=wire.geometry_to_proto(self._store.geometry),
            token_start=target.tokens.start,
            token_stop=target.tokens.stop,
            transports=["grpc"],
            host=self._host,
            encoding=self._store.geometry.encoding,
        )


async def _read(call: Call) -> pb.TransferResponse | grpc.aio.AioRpcError | None:
    """The next answer, the error that the call ended with, or None when it ended without one."""
    try:
        answer = await call.read()
    except grpc.aio.AioRpcError as error:
        return error
    return answer if isinstance(answer, pb.TransferResponse) else None


def _is(answer: pb.TransferResponse | grpc.aio.AioRpcError | None, expected: str) -> bool:
    return isinstance(answer, pb.TransferResponse) and answer.WhichOneof("message") == expected


async def _until_ended(write: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await write()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        # The answer, which is being read, says why the stream has ended.
        logger.debug("the receiver has ended the stream: %s", error)
