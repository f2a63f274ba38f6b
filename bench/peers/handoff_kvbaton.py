"""kvbaton's hand-off between two KV pools, as bench/handoff.py asks: `handoff_kvbaton.py from|to BLOCKS`.

Sender, endpoint, tickets and pools are the services' own, on their event loop; nothing is left out: every frame is
verified, and a transfer has ended when the prefill side has read Applied. Its stream is open before, as in a service.
Ways: "grpc" and "shared_memory", each over a link that has chosen it, and beside them, between the same two processes
and pools, "tcp", "memcpy" and "crc32c" of `handoff_plain`.
"""

import asyncio
import sys
from contextlib import AsyncExitStack

import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.agreement import Agreement, LinkOffer
from kvbaton.handoff.choice import AUTO, GRPC, SHARED_MEMORY
from kvbaton.handoff.host import host_identity
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.http2.server import Methods, serving_kv
from kvbaton.handoff.incoming_links import LinkBook
from kvbaton.handoff.link_call import LinkCall
from kvbaton.handoff.links import LINK_METHOD
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, TicketBook
from kvbaton.handoff.sender import KvSender, OutgoingTransfer, SenderCounters, Target
from kvbaton.handoff.servicer import KvTransferServicer
from kvbaton.handoff.shared_memory import SharedMemoryOpener, SharedMemoryPool
from kvbaton.model.store import TorchKvStore
from kvbaton.rpc import serving
from kvbaton.v1 import types_pb2 as types
from peers import handoff_load, handoff_plain
from peers.handoff_load import Answer, Load, Pool, Stopwatch, checksum

FINGERPRINT = types.ModelFingerprint(architecture="bench", weights_digest="0", kv_dtype="bfloat16")
VOCABULARY = 32000
TIMEOUT_SECONDS = 60
PIECES = {"tcp": 1 << 20, "tcp, 4 MiB": 4 << 20}
"""Bytes of one call, by way."""

Parts = handoff_plain.Parts


class Side:
    """What both processes have."""

    def __init__(self, side: str, num_blocks: int) -> None:
        self.side = side
        layer = LayerGeometry(handoff_load.KV_HEADS, handoff_load.HEAD_DIM, handoff_load.HEAD_DIM)
        geometry = KvGeometry((layer,) * handoff_load.LAYERS, "bfloat16")
        cpu = torch.device("cpu")
        self.store = TorchKvStore(geometry, num_blocks, handoff_load.BLOCK_SIZE, cpu, shared=side == "from")
        everything = Load("", num_blocks * handoff_load.BLOCK_SIZE, 1, False, num_blocks, 0)
        content = handoff_load.pattern(everything.num_bytes, seed=1) if side == "from" else bytes(everything.num_bytes)
        start = 0
        for part in self.parts(everything)[0]:
            part[:] = content[start : start + len(part)]
            start += len(part)

    def parts(self, load: Load) -> list[Parts]:
        """Of each repeat of a load, its KV in this pool."""
        layers, tokens = range(handoff_load.LAYERS), range(load.num_tokens)
        return [self.store.landing(layers, blocks, tokens).parts for blocks in load.tables(self.side)]

    async def check(self, arguments: Answer) -> Answer:
        """The checksum of what a load moved, or should have; the decode side forgets it."""
        return {"checksum": checksum(self.parts(Load(**arguments)), wipe=self.side == "to")}


class Receiver(Side):
    """The decode side."""

    def __init__(self, stack: AsyncExitStack, num_blocks: int) -> None:
        super().__init__("to", num_blocks)
        self._stack = stack
        self._book = TicketBook()
        self._counters = ReceiverCounters()
        self._links = LinkBook("to", host_identity(), AUTO, [SharedMemoryOpener(self.store)])
        self._plain = handoff_plain.PlainReceiver()
        # What memcpy copies: the other pool's contents in this process.
        self._copy = Pool(num_blocks, seed=1)
        self._applied: asyncio.Queue[int] = asyncio.Queue(maxsize=64)

    async def open(self, _: Answer) -> Answer:
        """Listen."""
        servicer = KvTransferServicer(self._incoming, self._counters)
        methods: Methods = {**servicer.methods, LINK_METHOD: lambda stream: LinkCall(self._links, stream)}
        server = await self._stack.enter_async_context(serving_kv(methods, "127.0.0.1", 0))
        return {"port": server.port, "plain": self._plain.port}

    async def peer(self, _: Answer) -> Answer:
        """The other process is there."""
        self._plain.accept()
        return {}

    async def arm(self, arguments: Answer) -> Answer:
        """Make ready for a load: a ticket for each transfer."""
        self._load = Load(**arguments)
        tokens = range(self._load.num_tokens)
        reservations = [
            self._book.open(blocks, tokens, VOCABULARY, self._applied.put_nowait) for blocks in self._load.tables("to")
        ]
        return {"tickets": [reservation.ticket.hex() for reservation in reservations]}

    async def finish(self, _: Answer) -> Answer:
        """Wait until all of the armed load has come."""
        return (await self._finish()).answer()

    async def _finish(self) -> Stopwatch:
        load = self._load
        if load.way in PIECES:
            return self._plain.receive(self.parts(load), PIECES[load.way])
        if load.way in handoff_plain.ALONE:
            return handoff_plain.ALONE[load.way](self._copy.parts(load, "from"), self.parts(load))
        watch = Stopwatch()
        for _ in range(load.repeats):
            await self._applied.get()
            watch.end()
        return watch

    def _incoming(self) -> IncomingTransfer:
        return IncomingTransfer(self._book, self.store, FINGERPRINT, self._counters, self._links)


class _Opened(OutgoingTransfer):
    """Tells when the receiver is ready for it."""

    def __init__(self, geometry: KvGeometry, tokens: range) -> None:
        super().__init__(geometry, tokens)
        self.begun = asyncio.Event()

    def begin(self, window_start: int, frame_bytes: int | None) -> None:
        super().begin(window_start, frame_bytes)
        self.begun.set()


class Sender(Side):
    """The prefill side."""

    def __init__(self, stack: AsyncExitStack, num_blocks: int) -> None:
        super().__init__("from", num_blocks)
        self._stack = stack
        self._sender = KvSender(self.store, FINGERPRINT, host_identity(), SenderCounters())
        self._links: dict[str, tuple[Connection, Agreement]] = {}

    async def connect(self, arguments: Answer) -> Answer:
        """Reach the other process."""
        self._plain = handoff_plain.PlainSender(arguments["plain"])
        self._endpoint = f"127.0.0.1:{arguments['port']}"
        for way in (GRPC, SHARED_MEMORY):
            connection = await Connection.open(self._endpoint, TIMEOUT_SECONDS)
            self._stack.push_async_callback(connection.close)
            assert self.store.shared is not None
            offer = LinkOffer("from", host_identity(), way, [SharedMemoryPool(self.store.shared)])
            self._links[way] = connection, await offer.agree(connection.call(LINK_METHOD, None))
        return {}

    async def send(self, arguments: Answer) -> Answer:
        """Hand a load over."""
        tickets = [bytes.fromhex(ticket) for ticket in arguments.pop("tickets")]
        load = Load(**arguments)
        if load.way in PIECES:
            return self._plain.send(self.parts(load), PIECES[load.way]).answer()
        tokens = range(load.num_tokens)
        connection, agreement = self._links[load.way]
        watch = Stopwatch()
        for ticket, blocks in zip(tickets, load.tables("from"), strict=True):
            outgoing = _Opened(self.store.geometry, tokens)
            target = Target(endpoint=self._endpoint, ticket=ticket, attempt=1, tokens=tokens)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sender.send(connection, target, outgoing, TIMEOUT_SECONDS, agreement))
                # A service opens the stream when it takes the request up, and it is open when the first layer is done.
                await outgoing.begun.wait()
                watch.begin()
                outgoing.cached(tokens.stop, blocks)
                outgoing.first_token(1)
            watch.end()
        return watch.answer()


async def serve(side: str, num_blocks: int) -> None:
    """As `handoff_load.serve`, on a loop that runs meanwhile."""
    async with AsyncExitStack() as stack:
        process = Receiver(stack, num_blocks) if side == "to" else Sender(stack, num_blocks)
        handoff_load.reply({"ready": True})
        requests = handoff_load.requests()
        while (request := await asyncio.to_thread(next, requests, None)) is not None:
            verb, arguments = request
            handoff_load.reply(await getattr(process, verb)(arguments))


if __name__ == "__main__":
    serving.run(serve(sys.argv[1], int(sys.argv[2])))
