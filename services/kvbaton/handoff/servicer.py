"""KvTransferService.Transfer on the receiver's server: the thin shell around `IncomingTransfer`."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from kvbaton.engine.errors import KvbatonError, TransferRejectedError, UnavailableError
from kvbaton.handoff.codec import Frame, Message, WireError, decode_frame_start, decode_message
from kvbaton.handoff.http2.incoming import ServerStream
from kvbaton.handoff.http2.messages import Placement
from kvbaton.handoff.http2.server import Methods
from kvbaton.handoff.incoming_links import LinkEndedError
from kvbaton.handoff.receiver import Arrival, IncomingTransfer, ReceiverCounters, RequestEndedError
from kvbaton.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)

SERVICE_NAME = "kvbaton.v1.KvTransferService"


class KvTransferServicer:
    """Receives transfers on an event loop of its own; large messages never delay token streams."""

    def __init__(self, new_transfer: Callable[[], IncomingTransfer], counters: ReceiverCounters) -> None:
        """`new_transfer` makes the receiving half of one attempt."""
        self._new_transfer = new_transfer
        self._counters = counters

    @property
    def methods(self) -> Methods:
        """What `serving_kv` needs."""
        return {f"/{SERVICE_NAME}/Transfer": self._receive}

    def _receive(self, stream: ServerStream) -> "TransferCall":
        return TransferCall(self._new_transfer(), stream, self._counters)


class TransferCall:
    """One `Transfer` stream. What breaks half-way leaves nothing behind but bytes that are never read."""

    def __init__(self, transfer: IncomingTransfer, stream: ServerStream, counters: ReceiverCounters) -> None:
        self._transfer = transfer
        self._stream = stream
        self._counters = counters
        self._arrival: Arrival | None = None
        self._landing = False
        """Whether a commit waits for a device."""
        self._half_closed = False

    def place(self, start: memoryview, size: int) -> Placement | None:
        """Give out the reserved blocks for a frame that has passed every check that needs no payload."""
        found = decode_frame_start(start, size)
        if found is None:
            return None
        with self._refusing():
            if self._landing:
                raise TransferRejectedError("commit: nothing may follow before its answer")
            self._arrival = arrival = self._transfer.expect(found.info, found.payload_bytes)
            guard = _Refusing(arrival, self._refuse)
            return Placement(found.offset, arrival.landing.parts, guard, arrival.landed)
        return None

    def on_placed(self) -> None:
        """A frame's payload is in its blocks."""
        arrival, self._arrival = self._arrival, None
        assert arrival is not None
        with self._refusing():
            self._transfer.arrived(arrival)

    def on_message(self, message: bytes) -> None:
        """A header, a commit, or a frame in any other encoding."""
        with self._refusing():
            if self._landing:
                raise TransferRejectedError("commit: nothing may follow before its answer")
            decoded = decode_message(message)
            if not (isinstance(decoded, pb.KvCommit) and self._waits(decoded)):
                self._answer(decoded)

    def on_half_close(self) -> None:
        """All was said. The stream ends when all was answered."""
        self._half_closed = True
        if not self._landing:
            self._stream.end()

    def on_end(self) -> None:
        """Nothing is held for a stream that has ended."""
        self._arrival = None

    def _waits(self, commit: pb.KvCommit) -> bool:
        """Whether a device is still busy with the frames; the commit is then answered when it is done."""
        pending = self._transfer.landed()
        if pending is None or pending.done():
            return False
        self._landing = True
        waiting = asyncio.get_running_loop().run_in_executor(None, pending.wait)
        waiting.add_done_callback(lambda done: self._landed(commit, done))
        return True

    def _landed(self, commit: pb.KvCommit, waited: "asyncio.Future[None]") -> None:
        self._landing = False
        problem = None if waited.cancelled() else waited.exception()
        if self._stream.ended:
            return
        if problem is not None or waited.cancelled():
            self._stream.end(problem or UnavailableError("the worker is ending"))
            return
        with self._refusing():
            self._answer(commit)
        if self._half_closed:
            self._stream.end()

    def _answer(self, message: Message) -> None:
        match message:
            case Frame():
                self._transfer.write(message)
                return
            case pb.KvHeader():
                answer = pb.TransferResponse(ready=self._transfer.begin(message))
            case pb.KvCommit():
                answer = self._transfer.commit(message)
            case pb.KvConfirm():
                answer = self._transfer.confirm()
        self._stream.send(answer.SerializeToString())

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Errors of the block end the stream, with their reason."""
        try:
            yield
        except WireError as error:
            self._refuse(TransferRejectedError(f"malformed message: {error}"))
        except KvbatonError as error:
            self._refuse(error)

    def _refuse(self, error: KvbatonError) -> None:
        if not isinstance(error, TransferRejectedError):
            self._stream.end(error)
            return
        if not isinstance(error, RequestEndedError):
            self._counters.transfers_rejected += 1
            logger.warning("KV transfer from %s rejected: %s", self._stream.peer, error)
        ended = isinstance(error, LinkEndedError)
        rejected = pb.KvRejected(reason=str(error), link_ended=ended)
        self._stream.send(pb.TransferResponse(rejected=rejected).SerializeToString())
        self._stream.end()


class _Refusing:
    """An arrival's guard that tells the sender why before it raises."""

    def __init__(self, arrival: Arrival, refuse: Callable[[KvbatonError], None]) -> None:
        self._arrival = arrival
        self._refuse = refuse

    def __enter__(self) -> None:
        try:
            self._arrival.__enter__()
        except KvbatonError as error:
            self._refuse(error)
            raise

    def __exit__(self, *_: object) -> None:
        self._arrival.__exit__()
