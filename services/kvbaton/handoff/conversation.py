"""What a sender and a receiver say to each other on one stream, and what becomes of it when they do not."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from kvbaton.engine.errors import KvbatonError, NotFoundError, TransferRejectedError, UnavailableError
from kvbaton.engine.kv_store import Buffer
from kvbaton.handoff.http2.calls import ClientStream, StreamEndedError
from kvbaton.v1 import kv_transfer_pb2 as pb

# While the prompt is being computed nothing moves on the stream, so only the answers to what was sent are timed; what
# moves and stops moving, and a connection that says nothing any more, `http2` notices.
ANSWER_TIMEOUT_SECONDS = 10.0
"""Longest wait for one of the receiver's answers."""


class Conversation:
    """One transfer's stream. Its errors name the receiver."""

    def __init__(self, stream: ClientStream, endpoint: str) -> None:
        """`endpoint` is the receiver's host:port."""
        self._stream = stream
        self._endpoint = endpoint
        self._peer = f"decode worker {endpoint}"

    async def say(self, parts: Sequence[Buffer], *, last: bool = False) -> None:
        """Send a message, and none after the `last`. Raises StreamEndedError, after which `answer` says why."""
        await self._stream.send(parts, last=last)

    async def answer(self, expected: str) -> pb.TransferResponse:
        """The next answer.

        Raises TransferRejectedError when the receiver refuses, NotFoundError for a bad ticket, TimeoutError at the
        call's deadline, and UnavailableError when it is lost, silent, or answers anything but `expected`.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS) as limit:
                received = await self._stream.receive()
        except TimeoutError as error:
            if limit.expired():
                raise UnavailableError(f"{self._peer}: gave no answer for {ANSWER_TIMEOUT_SECONDS:.0f} s") from error
            raise TimeoutError(f"{self._peer}: deadline exceeded") from error
        except NotFoundError as error:
            raise NotFoundError(f"{self._peer}: {error}") from error
        except KvbatonError as error:
            reason = str(error).removeprefix(self._endpoint).lstrip(": ")
            raise UnavailableError(f"{self._peer}: {reason}") from error
        if received is None:
            raise UnavailableError(f"{self._peer} ended the transfer without an answer")
        return self._check(received, expected)

    async def unless_answered(self, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Do `work`, which sends, and stop it when the receiver says anything before it is done.

        Returns whether it was done. A receiver that refuses or vanishes is so noticed at once.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_until_ended(work))
            # Not at once: where the answer is to the last of the work, that has left, and is about to be over.
            self._stream.on_answer(lambda: loop.call_soon(task.cancel))
            if self._stream.answered:
                task.cancel()
            await asyncio.wait({task})
            self._stream.on_answer(None)
        return not task.cancelled() and task.result()

    async def finish(self) -> None:
        """Wait for the stream's own end, so that nobody takes it for a cancelled one. What can fail here is over."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                await self._stream.receive()
        except (KvbatonError, TimeoutError):
            return

    def close(self) -> None:
        """End the stream, if it has not ended."""
        self._stream.cancel()

    def early(self, expected: str) -> UnavailableError:
        """The error of a receiver that answers what it cannot know."""
        return UnavailableError(f"{self._peer} answered {expected} before everything was sent")

    def wrong(self, problem: object) -> UnavailableError:
        """The error of a receiver whose answer cannot be."""
        return UnavailableError(f"{self._peer} answered {problem}")

    def _check(self, received: bytes, expected: str) -> pb.TransferResponse:
        try:
            answer = pb.TransferResponse.FromString(received)
        except DecodeError as error:
            raise self.wrong("what cannot be parsed") from error
        if answer.HasField("rejected"):
            raise TransferRejectedError(f"{self._peer}: {answer.rejected.reason}")
        kind = answer.WhichOneof("message")
        if kind != expected:
            raise self.wrong(f"{kind} where {expected} must come")
        return answer


async def _until_ended(work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    try:
        await work()
    except StreamEndedError:
        return False
    return True
