"""KvTransferService.Transfer on the receiver's server: the thin shell around `IncomingTransfer`."""

import logging
from collections.abc import Callable

from kvbaton.engine.errors import KvbatonError, TransferRejectedError
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

    def place(self, start: memoryview, size: int) -> Placement | None:
        """Give out the reserved blocks for a frame that has passed every check that needs no payload."""
        found = decode_frame_start(start, size)
        if found is None:
            return None
        try:
            self._arrival = arrival = self._transfer.expect(found.info, found.payload_bytes)
        except KvbatonError as error:
            self._refuse(error)
            return None
        guard = _Refusing(arrival, self._refuse)
        return Placement(found.offset, arrival.landing.parts, guard, arrival.landed)

    def on_placed(self) -> None:
        """A frame's payload is in its blocks."""
        arrival, self._arrival = self._arrival, None
        assert arrival is not None
        try:
            self._transfer.arrived(arrival)
        except KvbatonError as error:
            self._refuse(error)

    def on_message(self, message: bytes) -> None:
        """A header, a commit, or a frame in any other encoding."""
        try:
            answer = self._apply(decode_message(message))
        except WireError as error:
            self._refuse(TransferRejectedError(f"malformed message: {error}"))
        except KvbatonError as error:
            self._refuse(error)
        else:
            if answer is not None:
                self._stream.send(answer.SerializeToString())

    def on_half_close(self) -> None:
        """All was said, and all was answered."""
        self._stream.end()

    def on_end(self) -> None:
        """Nothing is held for a stream that has ended."""
        self._arrival = None

    def _apply(self, message: Message) -> pb.TransferResponse | None:
        match message:
            case Frame():
                self._transfer.write(message)
                return None
            case pb.KvHeader():
                return pb.TransferResponse(ready=self._transfer.begin(message))
            case pb.KvCommit():
                return self._transfer.commit(message)
            case pb.KvConfirm():
                return self._transfer.confirm()

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
