"""What any system has to beat or to bear: one TCP stream between the pools, memcpy, and CRC32C."""

import socket
from collections.abc import Callable, Iterator, Sequence

from kvbaton.handoff.codec import crc32c
from peers.handoff_load import Stopwatch

HOST = "127.0.0.1"
_MOST_PARTS = 1000
"""Of one system call; Linux takes 1,024."""

Parts = Sequence[memoryview]


def pieces(parts: Parts, size: int) -> Iterator[list[memoryview]]:
    """Cut the parts into pieces of `size` bytes, each a list of views; the last may be smaller."""
    piece: list[memoryview] = []
    room = size
    for part in parts:
        start = 0
        while start < len(part):
            view = part[start : start + room]
            piece.append(view)
            start += len(view)
            room -= len(view)
            if room == 0 or len(piece) == _MOST_PARTS:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def send_parts(connection: socket.socket, parts: Parts, size: int) -> None:
    """Write all of it, in pieces of `size` bytes."""
    for piece in pieces(parts, size):
        if len(piece) == 1:
            connection.sendall(piece[0])
        else:
            _move(connection.sendmsg, piece)


def receive_parts(connection: socket.socket, parts: Parts, size: int) -> None:
    """Fill all of it, in pieces of `size` bytes."""
    for piece in pieces(parts, size):
        _move(lambda views: connection.recvmsg_into(views)[0], piece)


def _move(call: Callable[[list[memoryview]], int], piece: list[memoryview]) -> None:
    while piece:
        moved = call(piece)
        if not moved:
            raise SystemExit("the other process has gone")
        while piece and moved >= len(piece[0]):
            moved -= len(piece.pop(0))
        if moved:
            piece[0] = piece[0][moved:]


class PlainReceiver:
    """The reading end of a connection of its own."""

    def __init__(self) -> None:
        self._server = socket.create_server((HOST, 0))
        self.port: int = self._server.getsockname()[1]

    def accept(self) -> None:
        """The other end has connected."""
        self._connection, _ = self._server.accept()
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self, targets: Sequence[Parts], size: int) -> Stopwatch:
        """Fill each of the targets, and say so."""
        watch = Stopwatch()
        for parts in targets:
            receive_parts(self._connection, parts, size)
            watch.end()
            self._connection.send(b".")
        return watch


class PlainSender:
    """The writing end."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection((HOST, port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, sources: Sequence[Parts], size: int) -> Stopwatch:
        """Write each of the sources, the next when the one before has been received."""
        watch = Stopwatch()
        for parts in sources:
            watch.begin()
            send_parts(self._connection, parts, size)
            self._connection.recv(1)
        return watch


def copy(sources: Sequence[Parts], targets: Sequence[Parts]) -> Stopwatch:
    """memcpy, run by run."""
    pairs = [same_cuts(source, target) for source, target in zip(sources, targets, strict=True)]
    watch = Stopwatch()
    for runs in pairs:
        watch.begin()
        for source, target in runs:
            target[:] = source
        watch.end()
    return watch


def same_cuts(sources: Parts, targets: Parts) -> list[tuple[memoryview, memoryview]]:
    """Both payloads, as long as each other, cut wherever one of them is."""
    runs, ours, theirs = [], list(sources), list(targets)
    while ours:
        size = min(len(ours[0]), len(theirs[0]))
        runs.append((ours[0][:size], theirs[0][:size]))
        for parts in (ours, theirs):
            parts[0] = parts[0][size:]
            if not parts[0]:
                parts.pop(0)
    return runs


def check(sources: Sequence[Parts], _: Sequence[Parts]) -> Stopwatch:
    """CRC32C, which both ends of a transfer compute."""
    watch = Stopwatch()
    for parts in sources:
        watch.begin()
        crc32c(parts)
        watch.end()
    return watch


ALONE: dict[str, Callable[[Sequence[Parts], Sequence[Parts]], Stopwatch]] = {"memcpy": copy, "crc32c": check}
"""What one process does by itself, by way."""
