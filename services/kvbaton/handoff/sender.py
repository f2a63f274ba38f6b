"""The prefill side of a transfer: KV leaves layer by layer while the forward pass still runs.

`OutgoingTransfer` is told by the engine's thread what is ready; `send` runs on the event loop that KV has to itself,
hands the kernel views of blocks that stay held until it returns, and is paced by flow control: what waits is a few
numbers, not bytes.
"""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import KvStore
from kvbaton.handoff import wire
from kvbaton.handoff.clock import wall_ns
from kvbaton.handoff.codec import RunningDigest, crc32c, encode_frame_start, encode_message
from kvbaton.handoff.conversation import Conversation
from kvbaton.handoff.frames import FramePlanner, Rectangle
from kvbaton.handoff.http2.calls import StreamEndedError
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.reading_ahead import ReadingAhead
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types

METHOD = "/kvbaton.v1.KvTransferService/Transfer"


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
        self, connection: Connection, target: Target, outgoing: OutgoingTransfer, timeout: float | None
    ) -> TransferReport:
        """Move everything to `target` and return once it was applied. `timeout` is the request's, in seconds.

        Raises TransferRejectedError, NotFoundError (ticket), UnavailableError (receiver lost) or TimeoutError.
        """
        outgoing.attach()
        conversation = Conversation(connection.call(METHOD, timeout), target.endpoint)
        try:
            await self._converse(conversation, target, outgoing)
        except TransferRejectedError:
            self._counters.transfers_rejected += 1
            raise
        finally:
            conversation.close()
        return outgoing.report

    async def _converse(self, conversation: Conversation, target: Target, outgoing: OutgoingTransfer) -> None:
        with contextlib.suppress(StreamEndedError):
            await conversation.say([encode_message(self._header(target))])
        ready = (await conversation.answer("ready")).ready
        try:
            outgoing.begin(ready.window_start)
        except ValueError as error:
            raise conversation.wrong(error) from error
        sent = await conversation.unless_answered(lambda: self._frames(conversation, target, outgoing))
        await conversation.answer("applied")
        if not sent:
            raise conversation.early("applied")
        outgoing.report.applied_ns = wall_ns()
        self._counters.transfers_applied += 1
        await conversation.finish()

    async def _frames(self, conversation: Conversation, target: Target, outgoing: OutgoingTransfer) -> None:
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
            size = sum(map(len, parts))
            await conversation.say([encode_frame_start(info, size), *parts])
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
        await conversation.say([encode_message(commit)], last=True)

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
