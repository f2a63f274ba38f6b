"""Descriptors of memory, from process to process on one host, over a UNIX socket that has no file.

The receiver listens under a random name and expects descriptors for the links that it has begun. A sender connects and
writes the link's id, 16 bytes, with one descriptor; the receiver answers with one byte once it has taken it. Both ends
make sure that the other runs under their own user. Whatever else comes is closed, and nobody is waited for long.
"""

import array
import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable

from kvbaton.engine.errors import UnavailableError

logger = logging.getLogger(__name__)

LINK_ID_BYTES = 16
MAX_CLIENTS = 16
"""Connections that may say nothing yet, at a time."""
CLIENT_SECONDS = 2.0
"""Longest wait for what a client has to say, and for the receiver's answer to it."""

_TAKEN = b"\x01"
# Should somebody send more than one they must be received to be closed; what does not fit the kernel closes.
_MAX_DESCRIPTORS = 4
_CREDENTIALS = struct.Struct("3i")


class DescriptorInbox:
    """The receiver's end. Listens, on the loop that `expect` was called on, while anything is expected."""

    def __init__(self, client_seconds: float = CLIENT_SECONDS) -> None:
        self._client_seconds = client_seconds
        self._lock = threading.Lock()
        self._expected: dict[bytes, int | None] = {}
        self._listener: _Listener | None = None

    def expect(self, link_id: bytes) -> str:
        """Take a descriptor for the link; returns the socket's name. Raises UnavailableError without such sockets."""
        with self._lock:
            if self._listener is None:
                try:
                    self._listener = _Listener(self._take, self._client_seconds)
                except (OSError, AttributeError) as error:
                    raise UnavailableError(f"this system has no sockets that pass descriptors: {error}") from error
            self._expected[link_id] = None
            return self._listener.name

    def collect(self, link_id: bytes) -> int | None:
        """The descriptor that has come for the link, from now on the caller's; None when none has. Any thread."""
        with self._lock:
            descriptor = self._expected.get(link_id)
            if descriptor is not None:
                del self._expected[link_id]
            return descriptor

    def forget(self, link_id: bytes) -> None:
        """Expect nothing for the link any more. Any thread, and more than once."""
        with self._lock:
            descriptor = self._expected.pop(link_id, None)
            listener = None
            if not self._expected:
                listener, self._listener = self._listener, None
        if descriptor is not None:
            os.close(descriptor)
        if listener is not None:
            listener.close()

    def _take(self, link_id: bytes, descriptor: int) -> bool:
        with self._lock:
            if self._expected.get(link_id, descriptor) is not None:
                return False
            self._expected[link_id] = descriptor
            return True


class _Listener:
    """The socket, and the clients that have not spoken yet."""

    def __init__(self, take: Callable[[bytes, int], bool], client_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._client_seconds = client_seconds
        self._clients: dict[socket.socket, asyncio.TimerHandle] = {}
        self.name = f"kvbaton-{secrets.token_hex(16)}"
        self._socket = _socket()
        try:
            self._socket.bind("\0" + self.name)
            self._socket.listen(MAX_CLIENTS)
        except OSError:
            self._socket.close()
            raise
        self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Any thread: hang up on everybody."""
        try:
            if asyncio.get_running_loop() is self._loop:
                return self._close()
        except RuntimeError:
            logger.debug("closed from another thread")
        try:
            self._loop.call_soon_threadsafe(self._close)
        except RuntimeError:
            # The loop is over, and watches nothing any more.
            for each in (self._socket, *self._clients):
                each.close()
        return None

    def _close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for client in list(self._clients):
            self._hang_up(client)

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError as error:
            logger.debug("a client was gone before it was accepted: %s", error)
            return
        client.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS or _user_of(client) != os.geteuid():
            logger.warning("a client of the descriptor socket was turned away: %d wait already", len(self._clients))
            client.close()
            return
        self._clients[client] = self._loop.call_later(self._client_seconds, self._hang_up, client)
        self._loop.add_reader(client, self._read, client)

    def _read(self, client: socket.socket) -> None:
        try:
            if self._receive(client):
                client.send(_TAKEN)
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("a client of the descriptor socket is gone: %s", error)
        self._hang_up(client)

    def _receive(self, client: socket.socket) -> bool:
        """Whether what came was expected: one message, of one id and one descriptor."""
        message, ancillary, flags, _ = client.recvmsg(
            LINK_ID_BYTES + 1, socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
        )
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) // descriptors.itemsize * descriptors.itemsize])
        # The message is whole or it is cut off: the socket keeps their borders.
        whole = not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) and len(message) == LINK_ID_BYTES
        if whole and len(descriptors) == 1 and self._take(message, descriptors[0]):
            return True
        for descriptor in descriptors:
            os.close(descriptor)
        if message:
            logger.warning(
                "the descriptor socket was sent %d bytes with %d descriptors", len(message), len(descriptors)
            )
        return False

    def _hang_up(self, client: socket.socket) -> None:
        timer = self._clients.pop(client, None)
        if timer is not None:
            timer.cancel()
            self._loop.remove_reader(client)
            client.close()


async def send_descriptor(name: str, link_id: bytes, descriptor: int, timeout: float = CLIENT_SECONDS) -> None:
    """Pass a descriptor to the process that listens under `name`, and wait until it is taken.

    Raises UnavailableError that says why it was not.
    """
    with contextlib.closing(_socket()) as client:
        try:
            # Without a network in between it is there at once, or not at all.
            client.connect("\0" + name)
            if _user_of(client) != os.geteuid():
                raise UnavailableError("the receiver's socket belongs to another user")
            socket.send_fds(client, [link_id], [descriptor])
            async with asyncio.timeout(timeout):
                answer = await asyncio.get_running_loop().sock_recv(client, 1)
        except TimeoutError as error:
            raise UnavailableError(f"the receiver did not take the descriptor within {timeout:g} s") from error
        except OSError as error:
            raise UnavailableError(f"the receiver's socket: {error}") from error
    if answer != _TAKEN:
        raise UnavailableError("the receiver did not expect the descriptor")


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


def _user_of(connected: socket.socket) -> int:
    _, user, _ = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)
