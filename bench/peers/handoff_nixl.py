"""NIXL between two KV pools, over UCX, as bench/handoff.py asks: `handoff_nixl.py from|to BLOCKS`.

The prefill side writes; a notification that travels behind the data tells the decode side that all is there. Ways:
"per block" takes a descriptor for each block, layer, K and V out of lists that were prepared at start, as vLLM does;
"coalesced" makes one descriptor of each run of blocks that follow one another, for each transfer.
Which of UCX's transports are used says UCX_TLS.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

from peers.handoff_load import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    ROW_BYTES,
    TENSORS,
    Answer,
    Load,
    Pool,
    Stopwatch,
    checksum,
    serve,
)

PATIENCE_SECONDS = 60


class Side:
    """What both processes have."""

    def __init__(self, side: str, num_blocks: int) -> None:
        self.side = side
        self.num_blocks = num_blocks
        self.pool = Pool(num_blocks, seed=1 if side == "from" else None)
        # Without the progress thread: it would share the core with this one, which polls anyway.
        self.agent = nixl_agent(side, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.agent.register_memory([(self.pool.address, self.pool.size, 0, "")], "DRAM")

    def check(self, arguments: Answer) -> Answer:
        """The checksum of what a load moved, or should have; the decode side forgets it."""
        return {"checksum": checksum(self.pool.parts(Load(**arguments), self.side), wipe=self.side == "to")}


class Receiver(Side):
    """The decode side."""

    def open(self, _: Answer) -> Answer:
        """What the other process needs to find this one."""
        return {"metadata": self.agent.get_agent_metadata().hex(), "address": self.pool.address}

    def peer(self, arguments: Answer) -> Answer:
        """The other process is there."""
        self.agent.add_remote_agent(bytes.fromhex(arguments["metadata"]))
        return {}

    def arm(self, arguments: Answer) -> Answer:
        """Make ready for a load."""
        self._load = Load(**arguments)
        return {}

    def finish(self, arguments: Answer) -> Answer:
        """Wait until all of the armed load has come."""
        watch = Stopwatch()
        for number in range(self._load.repeats):
            tag = str(number).encode()
            _poll(lambda tag=tag: self.agent.check_remote_xfer_done("from", tag, tag_is_prefix=False))  # type: ignore[misc]
            watch.end()
        return watch.answer()


class Sender(Side):
    """The prefill side."""

    def connect(self, arguments: Answer) -> Answer:
        """Reach the other process."""
        self._theirs = arguments["address"]
        self._peer = self.agent.add_remote_agent(bytes.fromhex(arguments["metadata"]))
        self.agent.make_connection(self._peer)
        self._prepared: dict[int, tuple[Any, Any]] = {}
        return {"metadata": self.agent.get_agent_metadata().hex()}

    def send(self, arguments: Answer) -> Answer:
        """Write a load."""
        load = Load(**arguments)
        make = self._coalesced if load.way == "coalesced" else self._per_block
        tables = list(zip(load.tables("from"), load.tables("to"), strict=True))
        # Whole blocks are prepared once for all, and so is the last one, that all systems may move the same bytes.
        self._lists(load.num_tokens % BLOCK_SIZE)
        watch = Stopwatch()
        for number, (ours, theirs) in enumerate(tables):
            watch.begin()
            handle = make(load, ours, theirs, str(number).encode())
            if self.agent.transfer(handle) == "ERR":
                raise SystemExit("NIXL: the transfer failed")
            _poll(lambda handle=handle: self.agent.check_xfer_state(handle) != "PROC")  # type: ignore[misc]
            if self.agent.check_xfer_state(handle) != "DONE":
                raise SystemExit("NIXL: the transfer failed")
            handle.release()
        return watch.answer()

    def _coalesced(self, load: Load, ours: list[int], theirs: list[int], tag: bytes) -> Any:
        source, target = load.run_pairs(ours, theirs, merged=True)
        local = np.array([(self.pool.address + offset, size, 0) for offset, size in source], dtype=np.uint64)
        remote = np.array([(self._theirs + offset, size, 0) for offset, size in target], dtype=np.uint64)
        descriptors = self.agent.get_xfer_descs(local, "DRAM"), self.agent.get_xfer_descs(remote, "DRAM")
        return self.agent.initialize_xfer("WRITE", *descriptors, self._peer, tag)

    def _per_block(self, load: Load, ours: list[int], theirs: list[int], tag: bytes) -> Any:
        local, remote = self._lists(load.num_tokens % BLOCK_SIZE)
        source, target = self._indices(load, ours), self._indices(load, theirs)
        return self.agent.make_prepped_xfer("WRITE", local, source, remote, target, tag)

    def _lists(self, tail: int) -> tuple[Any, Any]:
        """Prepared descriptors of every block of every tensor, and of the first `tail` tokens of each."""
        if tail not in self._prepared:
            offsets = np.arange(TENSORS * self.num_blocks, dtype=np.uint64) * BLOCK_BYTES
            sizes = np.repeat(np.array([BLOCK_BYTES, max(1, tail) * ROW_BYTES], dtype=np.uint64), len(offsets))
            rows = np.stack((np.tile(offsets, 2), sizes, np.zeros(len(sizes), dtype=np.uint64)), axis=1)
            local = rows + np.array([self.pool.address, 0, 0], dtype=np.uint64)
            remote = rows + np.array([self._theirs, 0, 0], dtype=np.uint64)
            self._prepared[tail] = (
                self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM"),
                self.agent.prep_xfer_dlist(self._peer, remote, "DRAM"),
            )
        return self._prepared[tail]

    def _indices(self, load: Load, blocks: list[int]) -> Any:
        """Of the blocks' descriptors in all tensors; the last is one of the short ones when it is not full."""
        table = np.array(blocks, dtype=np.int32)
        if load.num_tokens % BLOCK_SIZE:
            table[-1] += TENSORS * self.num_blocks
        return (np.arange(TENSORS, dtype=np.int32)[:, None] * self.num_blocks + table[None, :]).reshape(-1)


def _poll(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"NIXL: no end after {PATIENCE_SECONDS} s")


if __name__ == "__main__":
    side, num_blocks = sys.argv[1], int(sys.argv[2])
    serve(Receiver(side, num_blocks) if side == "to" else Sender(side, num_blocks))
