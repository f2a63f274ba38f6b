"""gRPC's framing: however a stream is cut, the same messages come out of it, and what is placed lands in its place."""

import itertools
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.handoff.http2.messages import (
    START_BYTES,
    CompressedError,
    Gathered,
    MessageFault,
    MessageReader,
    MessageWriter,
    Placement,
    TooLargeError,
    TruncatedError,
)

LIMIT = 4096


class Listener:
    """Places messages that begin with P, in parts of `part_bytes` after an offset of one."""

    def __init__(self, part_bytes: int = 100) -> None:
        self.part_bytes = part_bytes
        self.messages: list[bytes] = []
        self.landed = bytearray()
        self._memory = bytearray()

    def place(self, start: memoryview, size: int) -> Placement | None:
        assert len(start) == START_BYTES
        if start[0] != ord("P"):
            return None
        self._memory = bytearray(size - 1)
        whole = memoryview(self._memory)
        parts = [whole[at : at + self.part_bytes] for at in range(0, size - 1, self.part_bytes)]
        self.landed.clear()
        return Placement(1, parts, nullcontext(), self._on_landed)

    def _on_landed(self, piece: memoryview) -> None:
        self.landed += piece

    def on_placed(self) -> None:
        assert self.landed == self._memory
        self.messages.append(b"P" + bytes(self._memory))

    def on_message(self, message: bytes) -> None:
        self.messages.append(message)


def framed(message: bytes) -> bytes:
    return b"".join(MessageWriter([message]).take(len(message) + 5))


def read(reader: MessageReader, data: bytes, cuts: list[int]) -> None:
    """Feed `data` in pieces of these sizes, over and over; where a place is offered, write there."""
    rest, sizes = memoryview(data), itertools.cycle(cuts)
    while rest:
        size = next(sizes)
        offered = reader.direct(size)
        written = 0
        for part in offered:
            piece = rest[: len(part)]
            part[: len(piece)] = piece
            rest = rest[len(piece) :]
            written += len(piece)
        assert written <= size
        if written:
            reader.landed(written)
        else:
            reader.feed(rest[:size])
            rest = rest[size:]


payloads = st.binary(max_size=40).flatmap(
    lambda start: st.integers(0, 1500).map(
        lambda more: (b"P" if more % 2 else b"w") + start + bytes([more % 251]) * more
    )
)


@given(st.lists(payloads, max_size=5), st.lists(st.integers(1, 700), min_size=1, max_size=5), st.integers(1, 300))
def test_the_same_messages_come_out_however_they_are_cut(
    messages: list[bytes], cuts: list[int], part_bytes: int
) -> None:
    listener = Listener(part_bytes)
    reader = MessageReader(listener, LIMIT, Gathered(LIMIT))
    read(reader, b"".join(map(framed, messages)), cuts)
    assert listener.messages == messages
    assert not reader.partial
    reader.finish()


@given(st.lists(st.binary(max_size=50), max_size=6), st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_a_writer_cuts_without_changing(parts: list[bytes], cuts: list[int]) -> None:
    writer, sizes = MessageWriter(parts), itertools.cycle(cuts)
    whole, pieces = b"".join(parts), []
    assert not writer.begun
    while writer.left:
        size = min(next(sizes), writer.left)
        taken = writer.take(size)
        assert sum(map(len, taken)) == size
        assert writer.begun == bool(writer.left)
        pieces += taken
    assert b"".join(pieces) == b"\0" + len(whole).to_bytes(4) + whole


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\1\0\0\0\0", CompressedError),
        (b"\0\xff\xff\xff\xff", TooLargeError),
        (b"\0" + (LIMIT + 1).to_bytes(4), TooLargeError),
    ],
)
def test_a_message_is_refused_by_its_prefix(data: bytes, fault: type[MessageFault]) -> None:
    listener = Listener()
    with pytest.raises(fault):
        MessageReader(listener, LIMIT, Gathered(LIMIT)).feed(memoryview(data))
    assert listener.messages == []


@pytest.mark.parametrize("length", range(1, 700, 37))
def test_an_end_within_a_message_is_noticed(length: int) -> None:
    for message in (b"P" * 700, b"w" * 700):
        reader = MessageReader(Listener(), LIMIT, Gathered(LIMIT))
        reader.feed(memoryview(framed(message)[:length]))
        assert reader.partial
        with pytest.raises(TruncatedError):
            reader.finish()


def test_what_is_gathered_is_bounded_over_all_streams_and_given_back() -> None:
    gathered = Gathered(1000)
    first, second = (MessageReader(Listener(), LIMIT, gathered) for _ in range(2))
    first.feed(memoryview(framed(b"w" * 900)[:-1]))
    with pytest.raises(TooLargeError, match="too much memory"):
        second.feed(memoryview(framed(b"w" * 900)[:-1]))
    first.drop()
    third = MessageReader(Listener(), LIMIT, gathered)
    second.drop()
    third.feed(memoryview(framed(b"w" * 900)))
    third.feed(memoryview(framed(b"w" * 990)))


def test_nothing_more_is_taken_after_a_drop() -> None:
    class Ending(Listener):
        def on_message(self, message: bytes) -> None:
            super().on_message(message)
            reader.drop()

    listener = Ending()
    reader = MessageReader(listener, LIMIT, Gathered(LIMIT))
    reader.feed(memoryview(framed(b"a") + framed(b"b") + framed(b"P" * 500)))
    assert listener.messages == [b"a"]
    assert reader.direct(100) == []


def test_the_guard_is_entered_around_each_write() -> None:
    class Guard:
        entered = 0
        closed = False

        def __enter__(self) -> None:
            if self.closed:
                raise PermissionError
            self.entered += 1

        def __exit__(self, *_: object) -> None:
            pass

    class Guarded(Listener):
        def place(self, start: memoryview, size: int) -> Placement | None:
            placement = super().place(start, size)
            assert placement is not None
            placement.guard = guard
            return placement

    guard = Guard()
    reader = MessageReader(Guarded(1000), LIMIT, Gathered(LIMIT))
    data = framed(b"P" * 1000)
    reader.feed(memoryview(data[:300]))
    reader.feed(memoryview(data[300:400]))
    assert guard.entered == 3, "the start, what came with it, and what came then"
    guard.closed = True
    with pytest.raises(PermissionError):
        reader.feed(memoryview(data[400:500]))
    with pytest.raises(PermissionError), reader.guard:
        pass
