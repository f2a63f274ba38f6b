"""Another process's pool on a GPU, as this process reads it (CUDA IPC).

What can be told is told before anything is mapped: the peer's GPU must be one that this process sees, its own or one
that its own can read directly. Then the peer's words are checked: what it says of its pool's size against what the
driver has mapped, what it says of its blocks against that. What the device then reads lies within the mapping, and so
cannot fault; whether it is the KV that was meant, the peer confirms once all is copied.
"""

from collections.abc import Sequence

import torch

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool_layout import PoolLayout
from kvbaton.engine.runs import slot_runs
from kvbaton.model.cuda.copies import DevicePool, KvCopies
from kvbaton.model.cuda.device_memory import Mapping
from kvbaton.model.cuda.runtime import CudaRuntime


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, in torch's numbering."""
    return [gpu_uuid(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]


def gpu_uuid(device: torch.device) -> str:
    """What tells a GPU from all others, on any host."""
    return str(torch.cuda.get_device_properties(device).uuid)


def readable_device(runtime: CudaRuntime, ours: int, gpus: Sequence[str], uuid: str) -> int | None:
    """The number of the GPU `uuid` among `gpus`, if the one numbered `ours` can read it; None if not, or not there.

    Raises CudaError.
    """
    if uuid not in gpus:
        return None
    theirs = gpus.index(uuid)
    return theirs if theirs == ours or runtime.can_access(ours, theirs) else None


class ForeignKv:
    """A peer's pool, mapped. The KV loop's."""

    def __init__(self, mapping: Mapping, layout: PoolLayout, geometry: KvGeometry, copies: KvCopies) -> None:
        """`layout` has passed `layout_problem`; `copies` are those of our own pool."""
        self._mapping = mapping
        self._pool: DevicePool | None = DevicePool(mapping.tensor, layout, geometry)
        self._copies = copies

    def probe(self, num_bytes: int) -> tuple[bytes, float]:
        """What lies in the pool's probe area, by way of our own device, and the seconds of one copy. Waits for it."""
        pool = self._open()
        start = pool.layout.probe_offset
        area = pool.memory[start : start + min(num_bytes, pool.layout.probe_bytes)]
        return self._copies.probe(area)

    def copy(self, layers: range, theirs: Sequence[int], tokens: range, blocks: Sequence[int]) -> None:
        """Queue the copy of `tokens` of `layers` into `blocks`, all that our request has.

        `theirs` are the peer's blocks, of which the first holds `tokens.start`. Raises TransferRejectedError for blocks
        that the peer does not have.
        """
        pool = self._open()
        size = pool.layout.block_size
        offset = tokens.start % size
        needed = -(-(offset + len(tokens)) // size)
        if len(theirs) != needed:
            raise TransferRejectedError(f"reference.blocks: {len(theirs)} where {needed} must be")
        if theirs and not (min(theirs) >= 0 and max(theirs) < pool.layout.num_blocks):
            raise TransferRejectedError(f"reference.blocks: {max(theirs)} of a pool of {pool.layout.num_blocks}")
        self._copies.copy(pool, layers, slot_runs(theirs, range(offset, offset + len(tokens)), size), (blocks, tokens))

    def close(self) -> None:
        """Unmap, once the copies that are queued are done; waits for them. Twice is harmless. Raises CudaError."""
        if self._pool is not None:
            self._pool = None
            try:
                self._copies.landed().wait()
            finally:
                self._mapping.close()

    def _open(self) -> DevicePool:
        if self._pool is None:
            raise TransferRejectedError("the link to the sender's memory has ended")
        return self._pool
