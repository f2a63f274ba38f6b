"""The decode side of a transfer: tickets, checks, and the only writes of foreign KV into this worker's memory.

Life of a reservation: `TicketBook.open` (blocks are reserved) -> one or more attempts, each an `IncomingTransfer`, of
which the newest alone may write -> applied once, or `TicketBook.close` at any moment. Frames are written by the
thread that reads them, while requests end on another: a reservation's lock makes closing wait for a write in
progress, so that no byte can reach a block that was given to somebody else.

Frames bring a payload, or name blocks in memory of the sender that a link has opened; those are copied from there, and
what was copied counts only once the sender has confirmed that it still held them.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from crc32c import crc32c as extend_crc32c

from kvbaton.engine.errors import NotFoundError, TransferRejectedError
from kvbaton.engine.kv_store import KvStore, Landing, Pending
from kvbaton.handoff import wire
from kvbaton.handoff.choice import AUTO, GRPC
from kvbaton.handoff.codec import Frame, RunningDigest, WireError, crc32c, referenced_blocks
from kvbaton.handoff.frames import Coverage, Rectangle
from kvbaton.handoff.incoming_links import IncomingLink, LinkBook
from kvbaton.handoff.landing import fill
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types

TICKET_BYTES = 16

Applied = Callable[[int], None]
"""Told the first token's id when the KV of a reservation is verified and in place."""


class RequestEndedError(TransferRejectedError):
    """The request went while its KV was on the way: a cancel, and nobody's fault."""


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks that wait for KV."""

    ticket: bytes
    blocks: Sequence[int]
    tokens: range
    """Tokens whose KV must come."""
    vocab_size: int
    """The first token's id must be below it."""
    on_applied: Applied
    window_start: int
    """The first of `tokens` that layers with a sliding window need."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    attempt: int = 0
    """The newest attempt; 0 before the first."""
    closed: bool = False


@dataclass(slots=True)
class ReceiverCounters:
    """Totals since start."""

    kv_bytes_received: int = 0
    transfers_applied: int = 0
    transfers_rejected: int = 0


class TicketBook:
    """All open reservations of a decode worker. Safe to use from several threads."""

    def __init__(self, on_closed: Callable[[], None] = lambda: None) -> None:
        """`on_closed` is called when nothing lands in a reservation's blocks any more, before they are given away."""
        self._on_closed = on_closed
        self._reservations: dict[bytes, Reservation] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reservations)

    def open(
        self,
        blocks: Sequence[int],
        tokens: range,
        vocab_size: int,
        on_applied: Applied,
        window_start: int | None = None,
    ) -> Reservation:
        """Make a ticket for reserved blocks, to be filled with the KV of `tokens`.

        Layers with a sliding window need those from `window_start` on; None for all of them.
        """
        start = tokens.start if window_start is None else window_start
        reservation = Reservation(secrets.token_bytes(TICKET_BYTES), blocks, tokens, vocab_size, on_applied, start)
        with self._lock:
            self._reservations[reservation.ticket] = reservation
        return reservation

    def find(self, ticket: bytes) -> Reservation:
        """Raises NotFoundError when the ticket is unknown, used or closed."""
        with self._lock:
            reservation = self._reservations.get(ticket)
        if reservation is None:
            raise NotFoundError("the ticket is unknown here, used, or its request has ended")
        return reservation

    def close(self, reservation: Reservation) -> None:
        """After this returns nothing is written to the reservation's blocks any more. Closing twice is harmless."""
        with self._lock:
            self._reservations.pop(reservation.ticket, None)
        with reservation.lock:
            reservation.closed = True
        self._on_closed()


class Arrival:
    """A frame whose payload is on its way into the reserved blocks.

    Entered, as a context, around each single write: closing the reservation waits for that one, and after it entering
    raises TransferRejectedError.
    """

    def __init__(
        self,
        info: pb.FrameInfo,
        rectangle: Rectangle,
        landing: Landing,
        lock: threading.Lock,
        check: Callable[[], None],
    ) -> None:
        self.info = info
        self.rectangle = rectangle
        self.landing = landing
        self.crc32c = 0
        """Of what has landed so far."""
        self._lock = lock
        self._check = check

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._check()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def landed(self, piece: memoryview) -> None:
        """The next piece of the payload is there. Its checksum is taken while the processor still has it at hand."""
        self.crc32c = extend_crc32c(piece, self.crc32c)


class IncomingTransfer:
    """One attempt: checks every message against what was promised, and writes what passes."""

    def __init__(
        self,
        book: TicketBook,
        store: KvStore,
        fingerprint: types.ModelFingerprint,
        counters: ReceiverCounters,
        links: LinkBook | None = None,
    ) -> None:
        """`store`, `fingerprint` and `links` are this worker's own; without links KV comes over gRPC alone."""
        self._book = book
        self._store = store
        self._fingerprint = fingerprint
        self._counters = counters
        self._links = links if links is not None else LinkBook("", types.HostIdentity(), AUTO)
        self._link: IncomingLink | None = None
        """Where frames are references, whose memory they refer to."""
        self._commit: pb.KvCommit | None = None
        """Verified, and not yet confirmed."""
        self._digest = RunningDigest()
        self._reservation: Reservation | None = None
        self._attempt = 0
        self._num_frames = 0
        self._payload_bytes = 0

    def begin(self, header: pb.KvHeader) -> pb.KvReady:
        """Accept a header, and say how its KV is to come.

        Raises NotFoundError for a bad ticket and TransferRejectedError, naming the field, when the two sides differ;
        LinkEndedError where all that is wrong is the link, and the attempt is not used up.
        """
        if self._reservation is not None:
            raise TransferRejectedError("header: a second one")
        reservation = self._book.find(header.ticket)
        encoding = header.encoding
        problem = wire.encoding_problem(encoding)
        problem = problem or wire.fingerprint_problem(self._fingerprint, header.fingerprint, encoding)
        problem = problem or wire.geometry_problem(self._store.geometry, header.geometry, encoding)
        if problem is None and (header.token_start, header.token_stop) != (
            reservation.tokens.start,
            reservation.tokens.stop,
        ):
            offered, wanted = range(header.token_start, header.token_stop), reservation.tokens
            problem = f"token range: sender offers {offered}, receiver needs {wanted}"
        # What lies in the sender's memory is not encoded.
        allowed = [name for name in self._links.allowed if name == GRPC or not encoding]
        transport = next((name for name in header.transports if name in allowed), None)
        if problem is None and transport is None:
            problem = f"transports: sender offers {list(header.transports)}, receiver has {allowed}"
        if problem is not None or transport is None:
            raise TransferRejectedError(problem)
        if transport != GRPC:
            self._link = self._links.find(header.link_id, transport)
        with reservation.lock:
            if header.attempt <= reservation.attempt:
                raise TransferRejectedError(f"attempt: {header.attempt} is not above {reservation.attempt}")
            reservation.attempt = header.attempt
        self._attempt = header.attempt
        self._store = self._store.encoded(encoding)
        self._coverage = Coverage(self._store.geometry, reservation.tokens, reservation.window_start)
        self._reservation = reservation
        self._store.landings_follow_engine()
        return pb.KvReady(transport=transport, window_start=reservation.window_start)

    def write(self, frame: Frame) -> None:
        """Verify a frame, and copy its payload, or what it refers to, into the reserved blocks.

        Raises TransferRejectedError when anything is wrong with it, or when the attempt or the request is over.
        """
        reservation, info = self._begun(), frame.info
        rectangle = self._rectangle(info)
        layers, tokens = rectangle.layers, rectangle.tokens
        if self._link is not None:
            self._copy(self._link, reservation, frame, rectangle)
        else:
            if frame.reference is not None:
                raise TransferRejectedError("frame.reference: without a link that gives access to memory")
            self._check_size(rectangle, len(frame.payload))
            self._check_crc(info, crc32c([frame.payload]))
            with reservation.lock:
                self._check_current(reservation)
                fill(self._store.landing(layers, reservation.blocks, tokens), frame.payload)
        self._add(info, rectangle)

    def expect(self, info: pb.FrameInfo, payload_bytes: int) -> "Arrival":
        """Verify a frame before its payload is there, and say where in the reserved blocks to receive it.

        Raises TransferRejectedError when anything is wrong with it, or when the attempt or the request is over.
        """
        reservation, rectangle = self._begun(), self._rectangle(info)
        if self._link is not None:
            raise TransferRejectedError(f"frame.payload: where {self._link.chosen} was chosen a reference must come")
        self._check_size(rectangle, payload_bytes)
        with reservation.lock:
            self._check_current(reservation)
            landing = self._store.landing(rectangle.layers, reservation.blocks, rectangle.tokens)
        return Arrival(info, rectangle, landing, reservation.lock, lambda: self._check_current(reservation))

    def arrived(self, arrival: "Arrival") -> None:
        """All of an expected payload is in its place.

        Raises TransferRejectedError when it was damaged, or when the attempt or the request is over.
        """
        self._check_crc(arrival.info, arrival.crc32c)
        with arrival:
            arrival.landing.finish()
        self._add(arrival.info, arrival.rectangle)

    def landed(self) -> Pending | None:
        """What must be done before `commit`: the last of the frames' copies on a device."""
        return self._store.landed()

    def commit(self, commit: pb.KvCommit) -> pb.TransferResponse:
        """Verify the whole, and hand it over to the engine, unless the sender must confirm it first.

        Raises TransferRejectedError when anything is missing or differs; the KV is then never used.
        """
        reservation = self._begun()
        if not self._coverage.complete:
            raise TransferRejectedError("commit: not all layers of all tokens have arrived")
        if (commit.num_frames, commit.payload_bytes) != (self._num_frames, self._payload_bytes):
            sent, got = (commit.num_frames, commit.payload_bytes), (self._num_frames, self._payload_bytes)
            raise TransferRejectedError(f"commit: frames and bytes sent {sent}, received {got}")
        if commit.first_token_id >= reservation.vocab_size:
            raise TransferRejectedError(f"commit.first_token_id: {commit.first_token_id} is no token of the model")
        if commit.digest != self._digest.value(commit.first_token_id):
            raise TransferRejectedError("commit.digest: differs from what was received")
        self._commit = commit
        if self._link is None:
            return self._apply(reservation, commit)
        with reservation.lock:
            self._check_current(reservation)
        return pb.TransferResponse(copied=pb.KvCopied(num_frames=self._num_frames))

    def confirm(self) -> pb.TransferResponse:
        """The sender still holds what was copied: hand it over to the engine.

        Raises TransferRejectedError when there is nothing to confirm, or the attempt or the request is over.
        """
        if self._reservation is None or self._link is None or self._commit is None:
            raise TransferRejectedError("confirm: nothing was copied and committed")
        return self._apply(self._reservation, self._commit)

    def _apply(self, reservation: Reservation, commit: pb.KvCommit) -> pb.TransferResponse:
        """The ticket is used up."""
        with reservation.lock:
            self._check_current(reservation)
            # Closed from here on: nothing may write to blocks that are being decoded on.
            reservation.closed = True
        self._book.close(reservation)
        self._counters.transfers_applied += 1
        reservation.on_applied(commit.first_token_id)
        applied = pb.KvApplied(num_frames=self._num_frames, payload_bytes=self._payload_bytes)
        return pb.TransferResponse(applied=applied)

    def _copy(self, link: IncomingLink, reservation: Reservation, frame: Frame, rectangle: Rectangle) -> None:
        """Copy what a frame refers to, and check what was copied."""
        if frame.reference is None or frame.payload:
            raise TransferRejectedError(f"frame.payload: where {link.chosen} was chosen a reference must come")
        try:
            theirs = referenced_blocks(frame.reference)
        except WireError as error:
            raise TransferRejectedError(f"frame.{error}") from error
        layers, tokens = rectangle.layers, rectangle.tokens
        needed = link.blocks_of(tokens)
        if len(theirs) != needed:
            raise TransferRejectedError(f"frame.reference: {len(theirs)} blocks where {needed} must come")
        with reservation.lock:
            self._check_current(reservation)
            with link.pool() as pool:
                found = pool.copy(layers, theirs, tokens, reservation.blocks)
        # A device computes none.
        if found is not None:
            self._check_crc(frame.info, found)

    def _rectangle(self, info: pb.FrameInfo) -> Rectangle:
        """What a frame covers, if it may come next."""
        rectangle = Rectangle(range(info.layer_start, info.layer_stop), range(info.token_start, info.token_stop))
        if info.attempt != self._attempt:
            raise TransferRejectedError(f"frame.attempt: {info.attempt} within attempt {self._attempt}")
        if info.number != self._num_frames:
            raise TransferRejectedError(f"frame.number: {info.number} where {self._num_frames} must come")
        problem = self._coverage.problem(rectangle)
        if problem is not None:
            raise TransferRejectedError(f"frame {info.number}: {problem}")
        return rectangle

    def _bytes_of(self, rectangle: Rectangle) -> int:
        layers, tokens = rectangle.layers, rectangle.tokens
        return self._store.geometry.span_bytes(layers.start, layers.stop, len(tokens))

    def _check_size(self, rectangle: Rectangle, payload_bytes: int) -> None:
        expected = self._bytes_of(rectangle)
        if payload_bytes != expected:
            raise TransferRejectedError(f"frame.payload: {payload_bytes} bytes where {expected} must come")

    def _add(self, info: pb.FrameInfo, rectangle: Rectangle) -> None:
        """A frame has passed every check and is in its blocks."""
        size = self._bytes_of(rectangle)
        self._coverage.add(rectangle)
        self._digest.add(info)
        self._num_frames += 1
        self._payload_bytes += size
        self._counters.kv_bytes_received += size

    def _check_crc(self, info: pb.FrameInfo, found: int) -> None:
        if found != info.crc32c:
            raise TransferRejectedError(f"frame.crc32c: frame {info.number} was damaged on its way")

    def _begun(self) -> Reservation:
        if self._reservation is None:
            raise TransferRejectedError("header: must come first")
        if self._commit is not None and not self._reservation.closed:
            raise TransferRejectedError("commit: nothing but its confirmation may follow")
        return self._reservation

    def _check_current(self, reservation: Reservation) -> None:
        if reservation.closed:
            raise RequestEndedError("the request has ended")
        if reservation.attempt != self._attempt:
            raise TransferRejectedError(f"attempt {self._attempt} was replaced by {reservation.attempt}")
