"""The sender's half of a link's conversation: from hello to chosen, over anything that carries messages."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from google.protobuf.message import DecodeError

from kvbaton.engine.errors import KvbatonError, UnavailableError
from kvbaton.engine.kv_store import Buffer
from kvbaton.handoff.choice import AUTO, GRPC, Choice, LeftOut, allowed, candidates, chosen, refusal
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.http2.calls import StreamEndedError
from kvbaton.handoff.sharing import SharedPool
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types

LINK_ID_BYTES = 16

GRPC_PROBE_BYTES = 4 << 20
"""Payload of the probe over grpc: long enough for a speed to show, a millisecond or two on one host."""

STEP_TIMEOUT_SECONDS = 10.0
"""Longest wait for one answer."""


class LinkStream(Protocol):
    """A stream of messages in both directions, as `http2` has it."""

    async def send(self, parts: Sequence[Buffer], *, last: bool = False) -> None:
        """One message, its parts concatenated. Raises StreamEndedError when the stream has ended."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None when the stream has ended well. Raises KvbatonError when it has not."""
        ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both ends of a link know of it."""

    link_id: bytes
    incarnation: str
    """The receiver's."""
    choice: Choice


BY_GRPC = Agreement(b"", "", Choice(GRPC, "nothing was agreed on", warn=False))
"""What needs no link."""


@dataclass(slots=True)
class LinkOffer:
    """What this worker offers to every receiver; makes the sender's half of each link."""

    incarnation: str
    host: types.HostIdentity
    setting: str
    """`--transport`."""
    pools: Sequence[SharedPool] = ()
    """The reference transports that its memory makes possible."""
    left_out: Sequence[LeftOut] = ()
    """Transports that would be possible, and are not offered to anybody."""
    _probing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def transports(self) -> tuple[str, ...]:
        """Those that are offered, best first."""
        return allowed(self.setting, [*(pool.transport for pool in self.pools), GRPC])

    async def agree(self, stream: LinkStream) -> Agreement:
        """Hold the whole conversation and return what was chosen. The stream stays open.

        Raises UnavailableError when no transport is left, or when the receiver does not keep to the conversation.
        """
        conversation = _Conversation(stream)
        hello = pb.LinkHello(incarnation=self.incarnation, host=self.host, transports=self.transports)
        pools = {pool.transport: pool for pool in self.pools if pool.transport in self.transports}
        for pool in pools.values():
            pool.describe(hello)
        greeting = pb.LinkRequest(hello=hello).SerializeToString()
        welcome = (await conversation.ask(greeting, "welcome")).welcome
        obstacles = _obstacles(hello, welcome)
        tried = candidates(hello.transports, self.host, welcome.host, obstacles)
        if self.setting == AUTO:
            tried = replace(tried, left_out=(*tried.left_out, *self.left_out))
        failures: dict[str, str] = {}
        for transport in tried.order:
            try:
                speed = await self._probe(conversation, transport, pools, welcome)
            except _ProbeFailedError as error:
                failures[transport] = str(error)
                continue
            choice = chosen(self.setting, tried, failures, transport, speed)
            told = pb.LinkChosen(transport=transport, reason=choice.reason, bytes_per_second=speed)
            await conversation.tell(pb.LinkRequest(chosen=told).SerializeToString())
            return Agreement(welcome.link_id, welcome.incarnation, choice)
        raise UnavailableError(refusal(self.setting, tried, failures))

    async def _probe(
        self,
        conversation: "_Conversation",
        transport: str,
        pools: Mapping[str, SharedPool],
        welcome: pb.LinkWelcome,
    ) -> float:
        """Bytes per second of a transport that works. Raises _ProbeFailedError for one that does not."""
        if transport == GRPC:
            return await _probe_by_payload(conversation)
        pool = pools[transport]
        pattern = await _pattern(pool.probe_bytes)
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                await pool.hand_over(welcome)
        except (KvbatonError, TimeoutError) as error:
            raise _ProbeFailedError(str(error) or "the receiver does not take what opens the pool") from error
        # There is one place for patterns in the pool, and many links.
        async with self._probing:
            pool.write_probe(pattern)
            probe = pb.LinkProbe(transport=transport, crc32c=crc32c([pattern]), num_bytes=len(pattern))
            probed = await conversation.probe(pb.LinkRequest(probe=probe).SerializeToString())
        return len(pattern) / probed.seconds if probed.seconds > 0 else 0.0


class _ProbeFailedError(Exception):
    """A transport does not work; the text says why."""


class _Conversation:
    """Questions and answers on one stream."""

    def __init__(self, stream: LinkStream) -> None:
        self._stream = stream

    async def tell(self, request: bytes) -> None:
        """Raises UnavailableError where nobody is there to hear it."""
        try:
            await self._stream.send([request])
        except StreamEndedError:
            await self._answer()
            raise UnavailableError("the link was answered where nothing was asked") from None

    async def ask(self, request: bytes, expected: str) -> pb.LinkResponse:
        """The answer to a serialised request. Raises UnavailableError for none, or for another than `expected`."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                # Where nothing can be sent any more, the answer says why.
                with contextlib.suppress(StreamEndedError):
                    await self._stream.send([request])
                answer = await self._answer()
        except TimeoutError:
            raise UnavailableError(f"no answer to the link for {STEP_TIMEOUT_SECONDS:.0f} s") from None
        try:
            response = pb.LinkResponse.FromString(answer)
        except DecodeError:
            raise UnavailableError("the answer to the link cannot be parsed") from None
        if response.WhichOneof("message") != expected:
            raise UnavailableError(f"the link was answered {response.WhichOneof('message')}, not {expected}")
        return response

    async def _answer(self) -> bytes:
        answer = await self._stream.receive()
        if answer is None:
            raise UnavailableError("the link was ended where an answer must come")
        return answer

    async def probe(self, request: bytes) -> pb.LinkProbed:
        """The answer to a serialised probe. Raises _ProbeFailedError when the pattern did not arrive."""
        probed = (await self.ask(request, "probed")).probed
        if probed.problem:
            raise _ProbeFailedError(probed.problem)
        return probed


async def _probe_by_payload(conversation: _Conversation) -> float:
    pattern = await _pattern(GRPC_PROBE_BYTES)
    probe = pb.LinkProbe(transport=GRPC, crc32c=crc32c([pattern]), num_bytes=len(pattern), payload=pattern)
    request = pb.LinkRequest(probe=probe).SerializeToString()
    begin = time.monotonic()
    await conversation.probe(request)
    return len(pattern) / max(time.monotonic() - begin, 1e-9)


async def _pattern(num_bytes: int) -> bytes:
    """Random bytes, so that what an earlier link left in the same memory cannot be taken for them."""
    # Some milliseconds: too long for a loop that carries KV.
    return await asyncio.to_thread(secrets.token_bytes, num_bytes)


def _obstacles(hello: pb.LinkHello, welcome: pb.LinkWelcome) -> dict[str, str]:
    """The receiver's answers by transport. Raises UnavailableError unless there is one for each offer."""
    if len(welcome.link_id) != LINK_ID_BYTES or len(welcome.obstacles) != len(hello.transports):
        raise UnavailableError(
            f"a welcome with a link id of {len(welcome.link_id)} bytes and {len(welcome.obstacles)} answers to "
            f"{len(hello.transports)} transports"
        )
    return dict(zip(hello.transports, welcome.obstacles, strict=True))
