"""What bench/handoff.py asks of the two processes of a pair, and KV pools for those that have none of their own.

A process answers each line of JSON with one line. Both ends compute from a `Load` which blocks the KV leaves and which
it lands in, so that nothing but the system under test carries anything. Standard library and `kvbaton.engine.runs`.
"""

import ctypes
import json
import mmap
import random
import resource
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvbaton.engine.runs import slot_runs

LAYERS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 28, 8, 128, 2
"""The 0.6b model of `random_models`, in bfloat16."""
BLOCK_SIZE = 16
TENSORS = 2 * LAYERS
"""K and V of each layer, in this order, lie one after the other in a pool."""
ROW_BYTES = KV_HEADS * HEAD_DIM * ELEMENT_BYTES
"""Of one token in a tensor."""
TOKEN_BYTES = TENSORS * ROW_BYTES
BLOCK_BYTES = BLOCK_SIZE * ROW_BYTES
"""Of one block in a tensor."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """Some transfers, one after another, each of `num_tokens` tokens."""

    way: str
    """How: what a process makes of this name is its own affair."""
    num_tokens: int
    repeats: int
    shuffled: bool
    """Blocks in any order, as in a pool that has been in use; else one after another, as in a fresh one."""
    num_blocks: int
    """Of each pool."""
    seed: int

    @property
    def num_bytes(self) -> int:
        """Of one transfer."""
        return self.num_tokens * TOKEN_BYTES

    def tables(self, side: str) -> list[list[int]]:
        """The block list of each repeat on one side ("from" or "to"); no block is in two while there are enough."""
        order = list(range(self.num_blocks))
        if self.shuffled:
            random.Random(f"{self.seed} {side}").shuffle(order)
        size = -(-self.num_tokens // BLOCK_SIZE)
        cuts = self.num_blocks // size
        return [order[index % cuts * size : (index % cuts + 1) * size] for index in range(self.repeats)]

    def runs(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Where a transfer's KV lies in a pool: (offset, size) of each run, in the order of a payload."""
        runs = slot_runs(blocks, range(self.num_tokens), BLOCK_SIZE)
        rows = [(run.start * ROW_BYTES, len(run) * ROW_BYTES) for run in runs]
        return self._in_all_tensors(rows)

    def block_runs(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """The same, but never two blocks in a run, whether they follow one another or not."""
        sizes = [min(BLOCK_SIZE, self.num_tokens - start) for start in range(0, self.num_tokens, BLOCK_SIZE)]
        rows = [(block * BLOCK_BYTES, size * ROW_BYTES) for block, size in zip(blocks, sizes, strict=True)]
        return self._in_all_tensors(rows)

    def run_pairs(self, ours: Sequence[int], theirs: Sequence[int], *, merged: bool) -> tuple[Any, Any]:
        """The runs of both sides, cut in the same places; `merged` where blocks follow one another on both."""
        pair = self.runs(ours), self.runs(theirs)
        sizes = [[size for _, size in runs] for runs in pair]
        return pair if merged and sizes[0] == sizes[1] else (self.block_runs(ours), self.block_runs(theirs))

    def _in_all_tensors(self, rows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        stride = self.num_blocks * BLOCK_BYTES
        return [(tensor * stride + offset, size) for tensor in range(TENSORS) for offset, size in rows]


def pattern(num_bytes: int, seed: int) -> bytes:
    """Bytes that repeat at no distance which a mistake in addressing would be likely to have."""
    piece = random.Random(seed).randbytes((1 << 20) + 13)
    return (piece * (num_bytes // len(piece) + 1))[:num_bytes]


class Pool:
    """A KV pool in memory of this process, in large pages where the kernel gives them."""

    def __init__(self, num_blocks: int, seed: int | None) -> None:
        """Filled with the seed's pattern; without one with zeros, every page touched."""
        self.size = num_blocks * BLOCK_SIZE * TOKEN_BYTES
        memory = mmap.mmap(-1, self.size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(memory)
        self.bytes[:] = bytes(self.size) if seed is None else pattern(self.size, seed)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def parts(self, load: Load, side: str) -> list[list[memoryview]]:
        """Of each repeat of a load, its KV on this side."""
        tables = load.tables(side)
        return [[self.bytes[offset : offset + size] for offset, size in load.runs(blocks)] for blocks in tables]


def checksum(transfers: Sequence[Sequence[memoryview]], *, wipe: bool) -> int:
    """Of their concatenation; `wipe` them, so that the next transfer has something to do."""
    parts = [part for parts in transfers for part in parts]
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    for part in parts if wipe else ():
        part[:] = bytes(len(part))
    return value


class Stopwatch:
    """Times transfers by the clock that all processes of a host share, and the processor time of this one."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        self._cpu = cpu_seconds()

    def begin(self) -> None:
        """A transfer starts."""
        self.begins.append(time.monotonic_ns())

    def end(self) -> None:
        """One has ended, as far as this process knows."""
        self.ends.append(time.monotonic_ns())

    def answer(self) -> Answer:
        """All of it, since it was made."""
        return {"begins": self.begins, "ends": self.ends, "cpu": cpu_seconds() - self._cpu}


def cpu_seconds() -> float:
    """User's and kernel's time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def requests() -> Iterator[tuple[str, Answer]]:
    """What is asked for, until the input ends: a verb and its arguments."""
    for line in sys.stdin:
        request = json.loads(line)
        yield request.pop("do"), request


def serve(process: object) -> None:
    """Say ready, then answer each request by the method of its name, until the input ends."""
    reply({"ready": True})
    for verb, arguments in requests():
        reply(getattr(process, verb)(arguments))


def reply(answer: Answer) -> None:
    """Some libraries log to standard output too: the answers are the lines that begin so."""
    sys.stdout.write("\n#" + json.dumps(answer) + "\n")
    sys.stdout.flush()
