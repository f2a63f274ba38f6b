"""The cuda_ipc transport: a pool in a GPU's memory, shown to other processes of the host, and theirs opened here.

See `handoff.sharing`. There is no checksum of what a device copies: computing one would read it all once more. What
stands in for it is the probe, which shows that the memory is the one that was meant, and the sender's confirmation that
it held the blocks until all was copied.
"""

import logging
from collections.abc import Sequence

import torch
from crc32c import crc32c

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.pool_layout import PoolLayout, layout_problem
from kvbaton.handoff import wire
from kvbaton.handoff.choice import CUDA_IPC, Obstacle
from kvbaton.model.cuda.copies import KvCopies
from kvbaton.model.cuda.device_memory import Mapping
from kvbaton.model.cuda.foreign import ForeignKv, gpu_uuid, readable_device, visible_gpus
from kvbaton.model.cuda.runtime import HANDLE_BYTES, CudaError, CudaRuntime, cuda_runtime
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)


class CudaSharedPool:
    """A `SharedPool`: our pool, for receivers to open by its handle."""

    transport = CUDA_IPC

    def __init__(self, layout: PoolLayout, handle: bytes, gpu: str, copies: KvCopies) -> None:
        """`handle` stands for the pool's memory, which lies on `gpu`."""
        self.probe_bytes = layout.probe_bytes
        self._layout, self._handle, self._gpu, self._copies = layout, handle, gpu, copies

    def describe(self, hello: pb.LinkHello) -> None:
        """See `SharedPool.describe`."""
        hello.layout.CopyFrom(wire.layout_to_proto(self._layout))
        hello.cuda_ipc_handle = self._handle
        hello.gpu_uuid = self._gpu

    async def hand_over(self, welcome: pb.LinkWelcome) -> None:
        """Nothing: the handle was in the hello."""

    def write_probe(self, pattern: bytes) -> None:
        """See `SharedPool.write_probe`."""
        self._copies.write_probe(pattern)


class CudaForeignPool:
    """A `ForeignPool`: a sender's pool, mapped."""

    def __init__(self, kv: ForeignKv) -> None:
        self._kv = kv

    def probe(self, num_bytes: int) -> tuple[int, float]:
        """See `ForeignPool.probe`."""
        found, seconds = self._kv.probe(num_bytes)
        return crc32c(found), seconds

    def copy(self, layers: range, theirs: Sequence[int], tokens: range, blocks: Sequence[int]) -> int | None:
        """See `ForeignPool.copy`. Only queues the copy: `KvStore.landed` tells when it is done."""
        self._kv.copy(layers, theirs, tokens, blocks)
        return None

    def close(self) -> None:
        """See `ForeignPool.close`."""
        try:
            self._kv.close()
        except RuntimeError as error:
            # A device that has failed, or a sender that is gone: there is nothing left to unmap by hand.
            logger.warning("the sender's GPU memory was not unmapped: %s", error)


class CudaPoolOpener:
    """A `PoolOpener` for senders on this GPU, or on one that this GPU can read directly."""

    transport = CUDA_IPC

    def __init__(self, runtime: CudaRuntime, copies: KvCopies, gpus: Sequence[str], place: tuple[str, int]) -> None:
        """`gpus` are those that this process sees; `place` is its incarnation, and the number of its pool's GPU."""
        self._runtime, self._copies, self._gpus = runtime, copies, gpus
        self._incarnation, self._number = place

    def obstacle(self, hello: pb.LinkHello) -> str:
        """See `PoolOpener.obstacle`. Nothing is mapped yet."""
        if hello.incarnation == self._incarnation:
            return Obstacle.SAME_PROCESS.value
        if len(hello.cuda_ipc_handle) != HANDLE_BYTES:
            return f"cuda_ipc_handle: {len(hello.cuda_ipc_handle)} bytes where {HANDLE_BYTES} must be"
        problem = layout_problem(wire.layout_from_proto(hello.layout), self._copies.geometry)
        if problem is not None:
            return problem
        try:
            readable = readable_device(self._runtime, self._number, self._gpus, hello.gpu_uuid)
        except CudaError as error:
            return str(error)
        return "" if readable is not None else Obstacle.NO_PEER_ACCESS.value

    def invite(self, link_id: bytes) -> str:
        """There is no socket: the handle was in the hello."""
        return ""

    def open(self, hello: pb.LinkHello, link_id: bytes) -> CudaForeignPool:
        """See `PoolOpener.open`."""
        problem = self.obstacle(hello)
        if problem:
            raise UnavailableError(problem)
        layout = wire.layout_from_proto(hello.layout)
        # Where the memory lies, as torch does with tensors of other processes: it then finds the way between two GPUs.
        device = torch.device(self._copies.device.type, self._gpus.index(hello.gpu_uuid))
        try:
            mapping = Mapping(self._runtime, device, hello.cuda_ipc_handle, layout.num_bytes)
        except (CudaError, torch.OutOfMemoryError) as error:
            raise UnavailableError(f"the sender's GPU memory cannot be mapped: {error}") from error
        return CudaForeignPool(ForeignKv(mapping, layout, self._copies.geometry, self._copies))

    def forget(self, link_id: bytes) -> None:
        """Nothing was kept."""


def cuda_shared_pool(store: TorchKvStore) -> CudaSharedPool | None:
    """What senders on a GPU offer; None, and a warning, where CUDA cannot export the pool."""
    copies = store.device_copies
    if copies is None:
        return None
    if store.memory.obstacle:
        logger.warning("KV cannot be handed over by CUDA IPC: %s", store.memory.obstacle)
        return None
    device = store.memory.tensor.device
    try:
        handle = cuda_runtime().export(device.index, store.memory.tensor.data_ptr())
    except CudaError as error:
        logger.warning("KV cannot be handed over by CUDA IPC: %s", error)
        return None
    return CudaSharedPool(store.layout, handle, gpu_uuid(device), copies)


def cuda_pool_opener(store: TorchKvStore, incarnation: str) -> CudaPoolOpener | None:
    """What receivers on a GPU open senders' pools with; None, and a warning, where there is no CUDA runtime."""
    copies = store.device_copies
    if copies is None:
        return None
    try:
        runtime = cuda_runtime()
    except CudaError as error:
        logger.warning("KV cannot be received by CUDA IPC: %s", error)
        return None
    return CudaPoolOpener(runtime, copies, visible_gpus(), (incarnation, copies.device.index))
