"""A pool in host memory as the kernel of copies sees it: addresses, and block lists made into runs."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool_layout import PoolLayout, row_bytes
from kvbaton.model.cpu.copy_kernel import copy_runs, pair_runs, within
from kvbaton.model.cpu.crc32c_kernel import NOTHING, has_crc32c_unit

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class HostPool:
    """Where each plane lies, K and V of each layer in turn, and how many bytes a slot has in it."""

    def __init__(self, address: int, layout: PoolLayout, geometry: KvGeometry) -> None:
        """`address` is that of the pool's memory, which must outlive this. The layout has no problem."""
        offsets = zip(layout.k_offsets, layout.v_offsets, strict=True)
        self.addresses = np.array([[address + k, address + v] for k, v in offsets], np.int64).reshape(-1)
        self.widths = np.array(row_bytes(geometry), np.int64).reshape(-1)
        self.block_size, self.num_blocks = layout.block_size, layout.num_blocks
        self._own_planes = self.planes_from(self)

    def planes_from(self, source: "HostPool") -> Numbers:
        """For copies from a pool of the same geometry: see `copy_runs`."""
        return np.stack((source.addresses, self.addresses, self.widths), axis=1)

    def blocks(self, blocks: Sequence[int], tokens: range, *, whole: bool) -> Numbers:
        """As the kernel takes them: from the one that holds `tokens.start` on, as many as `tokens`, not none, need.

        `blocks` are the `whole` list of a request, or begin there already. Raises IndexError where there are fewer, or
        one is none of the pool's.
        """
        first = tokens.start // self.block_size
        needed = (tokens.stop - 1) // self.block_size - first + 1
        some = blocks[first : first + needed] if whole else blocks[:needed]
        if len(some) < needed:
            raise IndexError(f"{len(some)} blocks where {needed} hold tokens [{tokens.start}, {tokens.stop})")
        numbers = np.array(some, np.int64)
        if not within(numbers, self.num_blocks):
            raise IndexError(f"blocks {min(some)} to {max(some)} of a pool of {self.num_blocks}")
        return numbers

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        """CRC32C of the payload that the KV of `tokens` in the request's whole block list makes."""
        if not tokens:
            return 0
        numbers = self.blocks(blocks, tokens, whole=True)
        runs = pair_runs(numbers, self.block_size, numbers, self.block_size, tokens.start, tokens.stop)
        return copied(self._own_planes[2 * layers.start : 2 * layers.stop], runs, NOTHING)


def warm_up() -> None:
    """Compile, or load, what copies and checks: the first request would wait for it otherwise."""
    memory = np.zeros(64, np.uint8)
    address = memory.ctypes.data
    block = np.zeros(1, np.int64)
    if within(block, 1):
        copied(np.array([[address, address, 1]]), pair_runs(block, 1, block, 1, 0, 1), NOTHING)


def copied(planes: Numbers, runs: Numbers, mode: int) -> int:
    """`copy_runs`, or what takes its place."""
    if has_crc32c_unit():
        return int(copy_runs(planes, runs, mode))
    return copied_by_library(planes, runs, mode)


def copied_by_library(planes: Numbers, runs: Numbers, mode: int) -> int:
    """What `copy_runs` does, for processors that it cannot be compiled for."""
    value = 0
    for source, target, width in planes.tolist():
        for first, place, count in runs.tolist():
            size = count * width
            if mode != NOTHING:
                ctypes.memmove(target + place * width, source + first * width, size)
            value = crc32c(memoryview((ctypes.c_char * size).from_address(target + place * width)), value)
    return value
