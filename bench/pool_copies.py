"""Copies from another process's pool, checksum included, beside one large memcpy of as many bytes (ADR 18).

    taskset -c 1 python bench/pool_copies.py

Both pools, 1.3 GiB each, are in this process, one of them mapped once more as a receiver maps it; what is copied was in
no cache. All take turns; medians in GB/s. Half a minute.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.frames import FramePlanner, Rectangle
from kvbaton.model.store import TorchKvStore

GEOMETRY = KvGeometry((LayerGeometry(8, 128, 128),) * 28, "bfloat16")
NUM_BLOCKS, BLOCK_SIZE = 760, 16
MIB = 1 << 20


class Pools:
    """A sender's pool, a receiver's, and the receiver's view of the sender's."""

    def __init__(self) -> None:
        cpu = torch.device("cpu")
        self.theirs = TorchKvStore(GEOMETRY, NUM_BLOCKS, BLOCK_SIZE, cpu, shared=True)
        self.ours = TorchKvStore(GEOMETRY, NUM_BLOCKS, BLOCK_SIZE, cpu)
        for number, store in enumerate((self.theirs, self.ours)):
            store.memory.tensor.fill_(number)
        assert self.theirs.shared is not None, self.theirs.memory.obstacle
        self.foreign = self.ours.map_foreign(self.theirs.shared.descriptor, self.theirs.shared.layout)
        # Every page is mapped once a link; compiles the kernels, too.
        every = list(range(NUM_BLOCKS))
        self.foreign.copy(range(GEOMETRY.num_layers), every, range(NUM_BLOCKS * BLOCK_SIZE), every)
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def ways(self, frames: list[Rectangle], blocks: list[list[int]], offset: int) -> dict[str, Callable[[], object]]:
        """What is timed, by name; `blocks` are the sender's and the receiver's."""
        there, here = blocks
        size = sum(GEOMETRY.span_bytes(one.layers.start, one.layers.stop, len(one.tokens)) for one in frames)
        addresses = [store.memory.tensor.data_ptr() + offset for store in (self.ours, self.theirs)]
        theirs, copy = self.theirs, self.foreign.copy
        return {
            "memcpy": lambda: self._memcpy(*addresses, size),
            "copy": lambda: [copy(f.layers, there[f.tokens.start // BLOCK_SIZE :], f.tokens, here) for f in frames],
            "checksum": lambda: [theirs.checksum(f.layers, there, f.tokens) for f in frames],
            "library's": lambda: [crc32c(theirs.read(f.layers, there, f.tokens)) for f in frames],
        }


def frames_of(num_tokens: int) -> list[Rectangle]:
    """As a sender cuts them."""
    planner = FramePlanner(GEOMETRY, 0, num_tokens)
    planner.begin(0)
    for layer in range(GEOMETRY.num_layers):
        planner.advance(layer, num_tokens)
    return list(iter(planner.next, None))


def run(pools: Pools, size: int, apart: bool, rounds: int) -> dict[str, list[float]]:
    """Bytes a second of each way, by round."""
    random = np.random.default_rng(0)
    num_tokens = size // GEOMETRY.token_bytes
    frames, num_blocks = frames_of(num_tokens), -(-num_tokens // BLOCK_SIZE)
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        names = list(pools.ways([], [[], []], 0))
        for name in random.permutation(names):
            # Somewhere else for each: what the one before has read may be in a cache.
            starts = random.integers(0, NUM_BLOCKS - num_blocks + 1, 2)
            blocks = [
                (random.permutation(NUM_BLOCKS)[:num_blocks] if apart else start + np.arange(num_blocks)).tolist()
                for start in starts
            ]
            offset = int(starts[0]) * BLOCK_SIZE * GEOMETRY.token_bytes // 4096 * 4096
            way = pools.ways(frames, blocks, offset)[name]
            begin = time.perf_counter()
            way()
            seconds = time.perf_counter() - begin
            rates.setdefault(name, []).append(num_tokens * GEOMETRY.token_bytes / seconds)
    return rates


def main() -> None:
    """Prints a line for each size and order of blocks."""
    pools = Pools()
    for size, rounds in ((8 * MIB, 12), (64 * MIB, 12), (512 * MIB, 5)):
        for apart in (False, True):
            rates = run(pools, size, apart, rounds)
            shown = ", ".join(f"{name} {statistics.median(of) / 1e9:.1f}" for name, of in sorted(rates.items()))
            ratio = statistics.median(a / b for a, b in zip(rates["copy"], rates["memcpy"], strict=True))
            order = "apart" if apart else "in a row"
            sys.stdout.write(f"{size // MIB} MiB, blocks {order}: {shown} GB/s; copy / memcpy {ratio:.2f}\n")
    pools.foreign.close()


if __name__ == "__main__":
    main()
