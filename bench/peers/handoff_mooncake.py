"""Mooncake's engine over TCP between two KV pools, as bench/handoff.py asks: `handoff_mooncake.py from|to BLOCKS`.

The prefill side writes. The engine tells the writer alone that all is there; the writer tells the decode side, over a
connection beside it, as SGLang does. Ways: "per block" and "coalesced", as in handoff_nixl.py.
"""

import socket
import sys
from collections.abc import Sequence

from mooncake.engine import TransferEngine

from peers.handoff_load import Answer, Load, Pool, Stopwatch, checksum, serve

HOST = "127.0.0.1"
CALL_RUNS = 1024
"""Runs that one call moves: of more at once the engine's queue refused some, and with them the call."""


class Side:
    """What both processes have."""

    def __init__(self, side: str, num_blocks: int) -> None:
        self.side = side
        self.pool = Pool(num_blocks, seed=1 if side == "from" else None)
        self.engine = TransferEngine()
        _must(self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
        _must(self.engine.register_memory(self.pool.address, self.pool.size), "register_memory")

    def check(self, arguments: Answer) -> Answer:
        """The checksum of what a load moved, or should have; the decode side forgets it."""
        return {"checksum": checksum(self.pool.parts(Load(**arguments), self.side), wipe=self.side == "to")}


class Receiver(Side):
    """The decode side."""

    def open(self, _: Answer) -> Answer:
        """What the other process needs to find this one."""
        self._server = socket.create_server((HOST, 0))
        return {
            "segment": f"{HOST}:{self.engine.get_rpc_port()}",
            "address": self.pool.address,
            "port": self._server.getsockname()[1],
        }

    def peer(self, _: Answer) -> Answer:
        """The other process is there."""
        self._status, _address = self._server.accept()
        return {}

    def arm(self, arguments: Answer) -> Answer:
        """Make ready for a load."""
        self._load = Load(**arguments)
        return {}

    def finish(self, _: Answer) -> Answer:
        """Wait until all of the armed load has come."""
        watch = Stopwatch()
        for _number in range(self._load.repeats):
            if not self._status.recv(1):
                raise SystemExit("Mooncake: the other process has gone")
            watch.end()
        return watch.answer()


class Sender(Side):
    """The prefill side."""

    def connect(self, arguments: Answer) -> Answer:
        """Reach the other process."""
        self._segment, self._theirs = arguments["segment"], arguments["address"]
        self._status = socket.create_connection((HOST, arguments["port"]))
        self._status.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {}

    def send(self, arguments: Answer) -> Answer:
        """Write a load."""
        load = Load(**arguments)
        tables = list(zip(load.tables("from"), load.tables("to"), strict=True))
        watch = Stopwatch()
        for ours, theirs in tables:
            watch.begin()
            source, target = load.run_pairs(ours, theirs, merged=load.way == "coalesced")
            for start in range(0, len(source), CALL_RUNS):
                self._write(source[start : start + CALL_RUNS], target[start : start + CALL_RUNS])
            self._status.send(b".")
        return watch.answer()

    def _write(self, source: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]]) -> None:
        addresses = (
            [self.pool.address + offset for offset, _ in source],
            [self._theirs + offset for offset, _ in target],
        )
        sizes = [size for _, size in source]
        _must(self.engine.batch_transfer_sync_write(self._segment, *addresses, sizes), "batch_transfer_sync_write")


def _must(result: int, what: str) -> None:
    if result:
        raise SystemExit(f"Mooncake: {what} gave {result}")


if __name__ == "__main__":
    side, num_blocks = sys.argv[1], int(sys.argv[2])
    serve(Receiver(side, num_blocks) if side == "to" else Sender(side, num_blocks))
