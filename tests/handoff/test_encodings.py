"""KV that a sender declares to be encoded: taken in whichever dtype the receiver has, in the encoding's own size."""

import pytest

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.handoff.choice import AUTO
from kvbaton.handoff.codec import Frame, RunningDigest
from kvbaton.handoff.incoming_links import LinkBook
from kvbaton.handoff.landing import fill
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import GEOMETRY, FakeStore, fingerprint, frame_info, header
from support.links import FakeOpener, Memory

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


def test_what_is_encoded_comes_over_grpc_alone() -> None:
    book = TicketBook()
    reservation = book.open(OURS, TOKENS, 1000, list[int]().append)
    links = LinkBook("", types.HostIdentity(), AUTO, [FakeOpener(Memory())])
    assert links.allowed == ("shared_memory", "grpc")
    transfer = IncomingTransfer(book, FakeStore(), fingerprint(), ReceiverCounters(), links)
    with pytest.raises(TransferRejectedError, match=r"sender offers \['shared_memory'\], receiver has \['grpc'\]"):
        transfer.begin(header(reservation.ticket, TOKENS, encoding="int8", transports=["shared_memory"]))
    assert transfer.begin(header(reservation.ticket, TOKENS, encoding="int8")).transport == "grpc"
