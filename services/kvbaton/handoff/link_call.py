"""KvTransferService.Link on the receiver's server: the thin shell around `IncomingLink`."""

import logging
from typing import Protocol

from google.protobuf.message import DecodeError

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.handoff.incoming_links import IncomingLink, LinkBook
from kvbaton.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)


class AnsweringStream(Protocol):
    """A server's end of a stream, as `http2` has it."""

    def send(self, message: bytes) -> None:
        """Answer with one message."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """End the stream, with the status of an error or OK."""
        ...


class LinkCall:
    """One stream: its end, however it comes, is the link's."""

    def __init__(self, book: LinkBook, stream: AnsweringStream) -> None:
        """Raises OverloadedError when there are too many links."""
        self._stream = stream
        self._link: IncomingLink = book.begin()

    def place(self, start: memoryview, size: int) -> None:
        """Messages are taken whole."""

    def on_message(self, message: bytes) -> None:
        """Answer. What it raises ends the stream."""
        answer = self._link.on_message(_parsed(message))
        if answer is not None:
            self._stream.send(answer.SerializeToString())
        elif self._link.chosen:
            logger.info("linked by %s with the prefill worker %s", self._link.chosen, self._link.sender)

    def on_placed(self) -> None:
        """Never: nothing is placed."""

    def on_half_close(self) -> None:
        """The sender wants the link no more."""
        self._stream.end()

    def on_failure(self, error: Exception) -> None:
        """The stream ends with the error's status, and nothing more needs to be said."""

    def on_end(self) -> None:
        """Let go of the sender's memory."""
        self._link.close()


def _parsed(message: bytes) -> pb.LinkRequest:
    try:
        return pb.LinkRequest.FromString(message)
    except DecodeError:
        raise InvalidArgumentError("link", "the message cannot be parsed") from None
