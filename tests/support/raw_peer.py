"""A gRPC client made of bare frames, which does what no library would: stops half-way, claims what it does not send,
opens and never closes.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpack import Decoder, Encoder

from support import http2_frames as http2
from support.fakes import PATIENCE
from support.http2_frames import Http2Frame

METHOD = "/kvbaton.v1.KvTransferService/Transfer"


def request_block(encoder: Encoder, method: str = METHOD, **more: str) -> bytes:
    """A call's headers; names with a hyphen are written with an underscore."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *((name.replace("_", "-"), value) for name, value in more.items()),
    ]
    block: bytes = encoder.encode(headers)
    return block


class RawPeer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder, self._decoder = Encoder(), Decoder()
        self._next = 1

    def send(self, data: bytes) -> None:
        """Any bytes."""
        self.writer.write(data)

    def open(self, method: str = METHOD, *, end: bool = False) -> int:
        """Open a call, and return its stream."""
        stream, self._next = self._next, self._next + 2
        flags = http2.END_HEADERS | (http2.END_STREAM if end else 0)
        self.send(Http2Frame(http2.HEADERS, flags, stream, request_block(self.encoder, method)).encoded())
        return stream

    def data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """DATA frames; the windows are the caller's business."""
        pieces = [data[at : at + http2.MAX_FRAME] for at in range(0, len(data), http2.MAX_FRAME)] or [b""]
        for index, piece in enumerate(pieces):
            flags = http2.END_STREAM if end and index == len(pieces) - 1 else 0
            self.send(Http2Frame(http2.DATA, flags, stream, piece).encoded())

    async def read(self) -> Http2Frame | None:
        """The next frame; None at the connection's end."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await http2.read_frame(self.reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def end_of(self, stream: int) -> dict[str, str]:
        """The trailers of a call; empty when it was reset. Fails when the connection ends before."""
        while frame := await self.read():
            ended = False
            if frame.kind == http2.HEADERS:
                # The table of the connection depends on every block.
                headers = {str(name): str(value) for name, value in self._decoder.decode(frame.content)}
                ended = bool(frame.flags & http2.END_STREAM)
            if frame.stream == stream and (ended or frame.kind == http2.RST_STREAM):
                return headers if ended else {}
        raise AssertionError(f"the connection ended before stream {stream}")

    async def closed(self) -> bool:
        """Wait until the other side has closed the connection."""
        while await self.read() is not None:
            pass
        return True


@asynccontextmanager
async def raw_peer(address: str, *, greet: bool = True, receive_bytes: int = 0) -> AsyncIterator[RawPeer]:
    """Connect, and say what a client says first. The kernel keeps `receive_bytes` of answers, if that is given."""
    host, _, port = address.rpartition(":")
    connecting = socket.socket()
    connecting.setblocking(False)
    if receive_bytes:
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(connecting, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connecting)
    peer = RawPeer(reader, writer)
    if greet:
        peer.send(http2.PREFACE + http2.settings())
    try:
        yield peer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
