"""KV that a sender declares to be encoded: taken in whichever dtype the receiver has, in the encoding's own size."""

import pytest

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.handoff.codec import Frame, RunningDigest
from kvbaton.handoff.landing import fill
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import GEOMETRY, FakeStore, fingerprint, frame_info, header

OURS, THEIRS = [6, 3, 5], [0, 1, 2]
TOKENS, LAYERS = range(2, 10), range(GEOMETRY.num_layers)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "float8"])
def test_what_is_encoded_may_come_from_another_dtype(encoding: str) -> None:
    store, source, book, applied = FakeStore(), FakeStore(), TicketBook(), list[int]()
    for layer in LAYERS:
        source.fill(layer, THEIRS, range(10))
    reservation = book.open(OURS, TOKENS, 1000, applied.append)
    transfer = IncomingTransfer(book, store, fingerprint(), ReceiverCounters())
    # Weights are others where the dtype is, and yet the same model.
    other = fingerprint(kv_dtype="bfloat16", weights_digest="ff")
    head = header(reservation.ticket, TOKENS, encoding=encoding, fingerprint=other)
    head.geometry.dtype = "bfloat16"
    transfer.begin(head)
    payload = b"".join(source.encoded(encoding).read(LAYERS, THEIRS, TOKENS))
    plain = b"".join(source.read(LAYERS, THEIRS, TOKENS))
    with pytest.raises(TransferRejectedError, match=f"{len(plain)} bytes where {len(payload)} must come"):
        transfer.write(Frame(frame_info(0, LAYERS, TOKENS, plain), memoryview(plain)))
    info, digest = frame_info(0, LAYERS, TOKENS, payload), RunningDigest()
    transfer.write(Frame(info, memoryview(payload)))
    digest.add(info)
    transfer.commit(pb.KvCommit(first_token_id=7, num_frames=1, payload_bytes=len(payload), digest=digest.value(7)))
    assert applied == [7]
    decoded = FakeStore()
    fill(decoded.encoded(encoding).landing(LAYERS, OURS, TOKENS), payload)
    assert store.content(OURS, TOKENS) == decoded.content(OURS, TOKENS)
    assert store.content(OURS, TOKENS) != bytes(GEOMETRY.token_bytes * len(TOKENS))
