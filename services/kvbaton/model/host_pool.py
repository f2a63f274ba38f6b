"""A pool in host memory as the kernel of copies sees it: addresses, and block lists made into runs."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool_layout import PoolLayout, row_bytes
from kvbaton.model.cpu.copy_kernel import copy_runs, pair_runs
from kvbaton.model.cpu.crc32c_kernel import NOTHING, STREAM, has_crc32c_unit

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class HostPool:
    """Where each plane lies, K and V of each layer in turn, and how many bytes a slot has in it."""

    def __init__(self, address: int, layout: PoolLayout, geometry: KvGeometry) -> None:
        """`address` is that of the pool's memory, which must outlive this. The layout has no problem."""
        offsets = zip(layout.k_offsets, layout.v_offsets, strict=True)
        self.addresses = np.array([[address + k, address + v] for k, v in offsets], np.int64).reshape(-1)
        self.widths = np.array(row_bytes(geometry), np.int64).reshape(-1)
        self.block_size, self.num_blocks = layout.block_size, layout.num_blocks

    def blocks(self, blocks: Sequence[int], tokens: range) -> Numbers:
        """As the kernel takes them: from the one that holds `tokens.start` on, as many as `tokens` need.

        Raises IndexError where there are fewer, or one is none of the pool's.
        """
        needed = -(-tokens.stop // self.block_size) - tokens.start // self.block_size
        if len(blocks) < needed:
            raise IndexError(f"{len(blocks)} blocks where {needed} hold tokens [{tokens.start}, {tokens.stop})")
        numbers = np.array(blocks[:needed], np.int64)
        if numbers.min() < 0 or numbers.max() >= self.num_blocks:
            raise IndexError(f"blocks {numbers.min()} to {numbers.max()} of a pool of {self.num_blocks}")
        return numbers

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        """CRC32C of the payload that the tokens' KV makes; `blocks` begin with the one that holds `tokens.start`."""
        if not tokens:
            return 0
        numbers = self.blocks(blocks, tokens)
        planes = self._planes(self, layers)
        return _copied(planes, pair_runs(*(numbers, self.block_size) * 2, tokens.start, tokens.stop), NOTHING)

    def copy_from(self, source: "HostPool", layers: range, theirs: Numbers, ours: Numbers, tokens: range) -> int:
        """Copy the tokens' KV out of a pool of the same geometry, and give the CRC32C of what was copied.

        Both block lists are `blocks` of their pool.
        """
        runs = pair_runs(theirs, source.block_size, ours, self.block_size, tokens.start, tokens.stop)
        return _copied(self._planes(source, layers), runs, STREAM)

    def _planes(self, source: "HostPool", layers: range) -> Numbers:
        some = slice(2 * layers.start, 2 * layers.stop)
        return np.stack((source.addresses[some], self.addresses[some], self.widths[some]), axis=1)


def warm_up() -> None:
    """Compile, or load, what copies and checks: the first request would wait for it otherwise."""
    memory = np.zeros(64, np.uint8)
    address = memory.ctypes.data
    _copied(np.array([[address, address, 1]]), pair_runs(np.array([0]), 1, np.array([0]), 1, 0, 1), NOTHING)


def _copied(planes: Numbers, runs: Numbers, mode: int) -> int:
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
