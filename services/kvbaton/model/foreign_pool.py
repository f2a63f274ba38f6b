"""Another process's pool, mapped to be read, from a descriptor and from what that process says of it.

Nothing that it says is believed: a layout that leads outside of the memory is refused, and memory that its owner could
make smaller, because whoever reads what was cut off is killed (SIGBUS).
"""

import fcntl
import mmap
import os
import stat
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from kvbaton.engine.errors import TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool_layout import PoolLayout, layout_problem
from kvbaton.model.cpu.copy_kernel import pair_runs
from kvbaton.model.cpu.crc32c_kernel import STREAM
from kvbaton.model.host_pool import HostPool, copied

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class ForeignMemory:
    """A `ForeignPool` in host memory. It holds good after its owner's death, as long as it is mapped."""

    def __init__(self, descriptor: int, layout: PoolLayout, geometry: KvGeometry, ours: HostPool) -> None:
        """Maps the memory, read-only; `descriptor` stays the caller's. `ours` takes the copies.

        Raises UnavailableError that says what is wrong with the memory or the layout.
        """
        problem = layout_problem(layout, geometry) or _memory_problem(descriptor, layout.num_bytes)
        if problem:
            raise UnavailableError(f"the sender's memory: {problem}")
        try:
            memory = mmap.mmap(descriptor, layout.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the sender's memory cannot be mapped: {error}") from error
        self._memory: mmap.mmap | None = memory
        # A view of it that stayed would keep it from being unmapped.
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._theirs, self._ours, self._layout = HostPool(address, layout, geometry), ours, layout
        self._planes = ours.planes_from(self._theirs)
        self._lock = threading.Lock()

    def probe(self, num_bytes: int) -> tuple[int, float]:
        """See `ForeignPool.probe`."""
        if not 0 <= num_bytes <= self._layout.probe_bytes:
            raise UnavailableError(f"a probe of {num_bytes} bytes where there are {self._layout.probe_bytes}")
        target = np.empty(num_bytes, np.uint8)
        with self._lock:
            source = np.frombuffer(self._mapped(), np.uint8, num_bytes, self._layout.probe_offset)
            seconds = min(_seconds_to_copy(source, target) for _ in range(2))
            del source
        return crc32c(target.data), seconds

    def copy(self, layers: range, theirs: Sequence[int], tokens: range, blocks: Sequence[int]) -> int | None:
        """See `ForeignPool.copy`. In one pass: the checksum is that of the bytes that were written."""
        if not tokens:
            return 0
        try:
            source = self._theirs.blocks(theirs, tokens, whole=False)
        except IndexError as error:
            raise TransferRejectedError(f"reference: {error}") from error
        target = self._ours.blocks(blocks, tokens, whole=True)
        sizes = self._theirs.block_size, self._ours.block_size
        runs = pair_runs(source, sizes[0], target, sizes[1], tokens.start, tokens.stop)
        with self._lock:
            self._mapped()
            return copied(self._planes[2 * layers.start : 2 * layers.stop], runs, STREAM)

    def close(self) -> None:
        """See `ForeignPool.close`. Waits for a copy; closing twice is harmless."""
        with self._lock:
            if self._memory is not None:
                self._memory.close()
                self._memory = None

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            raise UnavailableError("the sender's memory: the link has ended")
        return self._memory


def _memory_problem(descriptor: int, num_bytes: int) -> str:
    """What speaks against reading `num_bytes` bytes of a file; empty for nothing."""
    try:
        status = os.fstat(descriptor)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) if stat.S_ISREG(status.st_mode) else 0
    except OSError as error:
        return f"not a file in memory ({error})"
    if not seals & fcntl.F_SEAL_SHRINK:
        return "not sealed against becoming smaller"
    if status.st_size < num_bytes:
        return f"{status.st_size} bytes, of which the layout names {num_bytes}"
    return ""


def _seconds_to_copy(source: Bytes, target: Bytes) -> float:
    start = time.perf_counter()
    target[:] = source
    return time.perf_counter() - start
