"""The one piece of memory that a pool's tensors lie in, which other processes may be able to map."""

import fcntl
import logging
import os
import weakref
from dataclasses import dataclass

import torch

from kvbaton.model.cpu.allocator import LargePages, mapped
from kvbaton.model.cuda import device_memory
from kvbaton.model.cuda.runtime import CudaError, cuda_runtime

logger = logging.getLogger(__name__)

# <linux/memfd.h> and <linux/fcntl.h>: what Python 3.11 has no names for.
_MFD_NOEXEC_SEAL = 0x8
_F_SEAL_FUTURE_WRITE = 0x10
_OWNER_ALONE = 0o600


@dataclass(frozen=True, eq=False)
class PoolMemory:
    """Uninitialised bytes on one device."""

    tensor: torch.Tensor
    """[num_bytes], uint8."""
    descriptor: int | None = None
    """Read-only, for other processes to map; None where they cannot."""
    obstacle: str = ""
    """Why they cannot."""

    def __post_init__(self) -> None:
        if self.descriptor is not None:
            weakref.finalize(self, os.close, self.descriptor)


def pool_memory(num_bytes: int, device: torch.device, shared: bool) -> PoolMemory:
    """Memory on `device`, which other processes can map if it is to be `shared` and that is possible.

    Pages are taken when they are first written. Raises RuntimeError when there is not that much.
    """
    if device.type != "cpu":
        return _on_device(num_bytes, device)
    obstacle = "the pool is not meant to be shared"
    if shared and not hasattr(os, "memfd_create"):
        obstacle = "this system has no memfd_create"
    elif shared:
        try:
            return _memfd(num_bytes)
        except OSError as error:
            obstacle = f"this system gives no memory that can be shared: {error}"
    return PoolMemory(LargePages().empty((num_bytes,), torch.uint8), obstacle=obstacle)


def _on_device(num_bytes: int, device: torch.device) -> PoolMemory:
    """An allocation of its own, which CUDA can export; torch's where there is no runtime to ask for one."""
    try:
        runtime = cuda_runtime()
    except CudaError as error:
        return PoolMemory(torch.empty(num_bytes, dtype=torch.uint8, device=device), obstacle=str(error))
    return PoolMemory(device_memory.allocate(runtime, device, num_bytes))


def _memfd(num_bytes: int) -> PoolMemory:
    """A file in memory, without a name: it goes with the last process that has it open or mapped, however that ends.

    Sealed, so that nobody can make it smaller, which would kill whoever reads what was cut off (SIGBUS); and where the
    kernel can (5.1), so that no further mapping of it is writable.
    """
    descriptor = _create()
    try:
        os.fchmod(descriptor, _OWNER_ALONE)
        os.truncate(descriptor, num_bytes)
        tensor = mapped(num_bytes, descriptor)
        _seal(descriptor)
        reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # The mapping keeps what it needs.
        os.close(descriptor)
    return PoolMemory(tensor, reader)


def _create() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("kvbaton-kv", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        # Linux before 6.3 does not know the flag.
        return os.memfd_create("kvbaton-kv", flags)


def _seal(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    except OSError:
        logger.debug("no F_SEAL_FUTURE_WRITE before Linux 5.1; the descriptor that others get is read-only in any case")
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
