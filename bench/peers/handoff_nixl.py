"""NIXL between two KV pools, over UCX, as bench/handoff.py asks: `handoff_nixl.py from|to BLOCKS`.

The prefill side writes, and a notification that travels behind the data tells the decode side that all is there; or the
decode side reads, as vLLM has it. Ways: "write per block" and "read per block" take a descriptor for each block, layer,
K and V out of lists that were prepared at start, as vLLM does; "write coalesced" and "read coalesced" make one
descriptor of each run of blocks that follow one another, for each transfer. Which of UCX's transports are used is for
UCX_TLS to say.
"""

import functools
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
    """Either process; both can begin a transfer."""

    def __init__(self, side: str, num_blocks: int) -> None:
        self.side = side
        self._peer_name = "to" if side == "from" else "from"
        self.num_blocks = num_blocks
        self.pool = Pool(num_blocks, seed=1 if side == "from" else None)
        # Without the progress thread: it would share the core with this one, which polls anyway.
        self.agent = nixl_agent(side, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.agent.register_memory([(self.pool.address, self.pool.size, 0, "")], "DRAM")
        self._prepared: dict[int, tuple[Any, Any]] = {}

    def open(self, _: Answer) -> Answer:
        """What the other process needs to find this one."""
        return {"metadata": self.agent.get_agent_metadata().hex(), "address": self.pool.address}

    def connect(self, arguments: Answer) -> Answer:
        """Reach the other process."""
        self.peer(arguments)
        return self.open({})

    def peer(self, arguments: Answer) -> Answer:
        """The other process is there."""
        self._theirs = arguments["address"]
        self._peer = self.agent.add_remote_agent(bytes.fromhex(arguments["metadata"]))
        self.agent.make_connection(self._peer)
        return {}

    def arm(self, arguments: Answer) -> Answer:
        """Decode side: make ready for a load."""
        self._load = Load(**arguments)
        return {}

    def finish(self, _: Answer) -> Answer:
        """Decode side: read the armed load, or wait until all of it has come."""
        reads = self._load.way.startswith("read")
        return (self._move(self._load, "READ", "to", "from") if reads else self._wait(self._load)).answer()

    def send(self, arguments: Answer) -> Answer:
        """Prefill side: write a load, or wait until all of it has been read."""
        load = Load(**arguments)
        if load.way.startswith("read"):
            watch = self._wait(load)
            return {**watch.answer(), "ends": []}
        return {**self._move(load, "WRITE", "from", "to").answer(), "ends": []}

    def check(self, arguments: Answer) -> Answer:
        """The checksum of what a load moved, or should have; the decode side forgets it."""
        return {"checksum": checksum(self.pool.parts(Load(**arguments), self.side), wipe=self.side == "to")}

    def _wait(self, load: Load) -> Stopwatch:
        watch = Stopwatch()
        for number in range(load.repeats):
            tag = str(number).encode()
            _poll(functools.partial(self.agent.check_remote_xfer_done, self._peer_name, tag, tag_is_prefix=False))
            watch.end()
        return watch

    def _move(self, load: Load, operation: str, mine: str, other: str) -> Stopwatch:
        make = self._coalesced if load.way.endswith("coalesced") else self._per_block
        # Whole blocks are prepared once for all, and so is the last one, that all systems may move the same bytes.
        self._lists(load.num_tokens % BLOCK_SIZE)
        pairs = zip(load.tables(mine), load.tables(other), strict=True)
        watch = Stopwatch()
        for number, tables in enumerate(pairs):
            watch.begin()
            handle = make(load, operation, tables, str(number).encode())
            state = self.agent.transfer(handle)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while state == "PROC" and time.monotonic() < deadline:
                state = self.agent.check_xfer_state(handle)
            if state != "DONE":
                raise SystemExit(f"NIXL: the transfer ended as {state}")
            watch.end()
            handle.release()
        return watch

    def _coalesced(self, load: Load, operation: str, tables: tuple[list[int], list[int]], tag: bytes) -> Any:
        ours, theirs = load.run_pairs(*tables, merged=True)
        local = np.array([(self.pool.address + offset, size, 0) for offset, size in ours], dtype=np.uint64)
        remote = np.array([(self._theirs + offset, size, 0) for offset, size in theirs], dtype=np.uint64)
        descriptors = self.agent.get_xfer_descs(local, "DRAM"), self.agent.get_xfer_descs(remote, "DRAM")
        return self.agent.initialize_xfer(operation, *descriptors, self._peer, tag)

    def _per_block(self, load: Load, operation: str, tables: tuple[list[int], list[int]], tag: bytes) -> Any:
        local, remote = self._lists(load.num_tokens % BLOCK_SIZE)
        ours, theirs = (self._indices(load, blocks) for blocks in tables)
        return self.agent.make_prepped_xfer(operation, local, ours, remote, theirs, tag)

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
    serve(Side(sys.argv[1], int(sys.argv[2])))
