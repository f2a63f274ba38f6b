"""Both sides of a transfer that is the same each time, so that its bytes can be a fuzzer's seeds."""

import random

from kvbaton.handoff.codec import RunningDigest, encode_frame, encode_message
from kvbaton.handoff.landing import fill
from kvbaton.handoff.receiver import TICKET_BYTES, IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import FakeStore, fingerprint, frame_info, header

TOKENS = range(2, 10)
BLOCKS, SOURCE_BLOCKS = [7, 3, 5], [0, 1, 2]
PIECES = [(range(2), range(2, 6)), (range(2, 3), range(2, 6)), (range(3), range(6, 10))]
FIRST_TOKEN = 42
TICKET = bytes(range(TICKET_BYTES))


class Sides:
    """A receiver with one reservation, and the messages that fill it."""

    def __init__(self) -> None:
        self.book, self.applied = TicketBook(), list[int]()
        self.sink, self.source = FakeStore(), FakeStore()
        self.counters = ReceiverCounters()
        self.reservation = self.book.open(BLOCKS, TOKENS, 1000, self.applied.append)
        # A ticket that the seeds can know.
        self.book._reservations = {TICKET: self.reservation}
        self.reservation.ticket = TICKET
        geometry = self.source.geometry
        layers = range(geometry.num_layers)
        payload = random.Random(0).randbytes(geometry.span_bytes(0, geometry.num_layers, 12))
        fill(self.source.landing(layers, SOURCE_BLOCKS, range(12)), payload)

    def attempt(self) -> IncomingTransfer:
        """The receiving half of a new attempt."""
        return IncomingTransfer(self.book, self.sink, fingerprint(), self.counters)

    def messages(self, attempt: int) -> list[bytes]:
        """Header, three frames and commit."""
        digest, size, encoded = RunningDigest(), 0, []
        for number, (layers, tokens) in enumerate(PIECES):
            payload = b"".join(self.source.read(layers, SOURCE_BLOCKS, tokens))
            info = frame_info(number, layers, tokens, payload, attempt)
            digest.add(info)
            size += len(payload)
            encoded.append(encode_frame(info, [payload]))
        commit = pb.KvCommit(
            first_token_id=FIRST_TOKEN,
            num_frames=len(PIECES),
            payload_bytes=size,
            digest=digest.value(FIRST_TOKEN),
        )
        begin = encode_message(header(self.reservation.ticket, TOKENS, attempt=attempt))
        return [begin, *encoded, encode_message(commit)]

    def check(self) -> None:
        """KV is used once at the most, and only if it is exactly what was sent."""
        assert self.applied in ([], [FIRST_TOKEN]), self.applied
        assert len(self.book) == (not self.applied)
        if self.applied:
            sent = self.source.content(SOURCE_BLOCKS, TOKENS)
            assert self.sink.content(BLOCKS, TOKENS) == sent, "KV that differs was applied"
