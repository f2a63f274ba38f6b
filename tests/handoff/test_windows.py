"""Layers with a sliding window over a real stream: they begin where the receiver says, and only where it may say so."""

import pytest

from kvbaton.engine.errors import TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.receiver import IncomingTransfer
from kvbaton.handoff.sender import OutgoingTransfer
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.chaos import Ends, ends

WHOLE, WINDOWED = LayerGeometry(2, 4, 4), LayerGeometry(1, 6, 2, window=9)
GEOMETRY = KvGeometry((WINDOWED, WHOLE, WINDOWED, WINDOWED), "float32")
TOKENS = range(4, 43)
SOURCE, TARGET = list(range(11)), list(range(20, 31))
START = 32


def compute(made: Ends) -> OutgoingTransfer:
    """KV that is computed in two chunks, the first of which ends before the window begins."""
    outgoing = OutgoingTransfer(made.source.geometry, TOKENS)
    for chunk in (range(20), range(20, TOKENS.stop)):
        for layer in range(GEOMETRY.num_layers):
            made.source.fill(layer, SOURCE, chunk)
            outgoing.layer_ready(layer, chunk.stop, SOURCE)
    outgoing.first_token(77)
    return outgoing


async def test_they_begin_where_the_receiver_says() -> None:
    async with ends(GEOMETRY, direct=True) as made:
        reservation = made.book.open(TARGET, TOKENS, 1000, made.applied.append, START)
        report = await made.send(reservation, compute(made))
        assert made.applied == [77]
    for layer, shape in enumerate(GEOMETRY.layers):
        start = TOKENS.start if shape.window is None else START
        sent, layers = range(start, TOKENS.stop), range(layer, layer + 1)
        assert b"".join(made.sink.read(layers, TARGET, sent)) == b"".join(made.source.read(layers, SOURCE, sent))
        assert not any(b"".join(made.sink.read(layers, TARGET, range(start))))
    size = 3 * 32 * (TOKENS.stop - START) + 64 * len(TOKENS)
    assert report.payload_bytes == made.sent.kv_bytes_sent == made.received.kv_bytes_received == size


@pytest.mark.parametrize("start", [TOKENS.start - 1, TOKENS.stop + 1])
async def test_a_receiver_that_says_what_it_may_not_is_refused(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = IncomingTransfer.begin

    def begin_elsewhere(transfer: IncomingTransfer, header: pb.KvHeader) -> pb.KvReady:
        ready = begin(transfer, header)
        ready.window_start = start
        return ready

    monkeypatch.setattr(IncomingTransfer, "begin", begin_elsewhere)
    async with ends(GEOMETRY, direct=True) as made:
        reservation = made.book.open(TARGET, TOKENS, 1000, made.applied.append, START)
        with pytest.raises(UnavailableError, match=rf"window start {start} of tokens \[4, 43\)"):
            await made.send(reservation, compute(made))
        assert made.applied == []
        assert made.sent.kv_bytes_sent == 0


async def test_a_sender_that_sends_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutgoingTransfer, "begin", lambda *_: None)
    async with ends(GEOMETRY, direct=True) as made:
        reservation = made.book.open(TARGET, TOKENS, 1000, made.applied.append, START)
        with pytest.raises(TransferRejectedError, match="layer 0 continues at token 32, the frame begins at 4"):
            await made.send(reservation, compute(made))
        assert made.applied == []
