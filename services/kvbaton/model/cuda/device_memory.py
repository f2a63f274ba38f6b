"""Device memory outside torch's allocator, as torch's tensors: this process's own, and what another one has exported.

A pool that other processes map must be one plain allocation of cudaMalloc: torch's allocator cuts its segments among
many tensors, and may make them of pieces that cannot be exported at all (expandable segments).
"""

import contextlib
import weakref
from typing import Any

import numpy as np
import torch

from kvbaton.model.cuda.runtime import CudaError, CudaRuntime

_GRANULE = 2 << 20
"""The driver cuts smaller allocations from a common block, all of which would then be exported."""


class _Region:
    """Bytes on a device, by numba's CUDA array interface and by numpy's. A tensor made of it keeps it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.interface


def allocate(runtime: CudaRuntime, device: torch.device, num_bytes: int) -> torch.Tensor:
    """Fresh memory, [num_bytes] of uint8; freed with the last tensor that is a view of it.

    Raises CudaError when the device has not that much.
    """
    number, size = _number(device), -(-num_bytes // _GRANULE) * _GRANULE
    try:
        address = runtime.malloc(number, size)
    except CudaError:
        # torch may sit on memory that none of its tensors uses.
        torch.cuda.empty_cache()
        address = runtime.malloc(number, size)
    region = _Region(address, num_bytes)
    # Not at the interpreter's exit: the driver takes all back then, and may be gone before.
    weakref.finalize(region, _free, runtime, number, address).atexit = False
    return _tensor(region, address, device)


class Mapping:
    """Another process's allocation, mapped on the device that it lies on. To be read, never written."""

    def __init__(self, runtime: CudaRuntime, device: torch.device, handle: bytes, num_bytes: int) -> None:
        """`num_bytes` of what `handle` stands for. Raises CudaError when it cannot be mapped, or is smaller."""
        self._runtime, self._number = runtime, _number(device)
        self._address = runtime.open(self._number, handle)
        try:
            extent = runtime.extent(self._number, self._address)
            if num_bytes > extent:
                raise CudaError(f"{num_bytes} bytes of an allocation that has {extent}")
            self.tensor = _tensor(_Region(self._address, num_bytes), self._address, device)
            """[num_bytes] of uint8. No view of it may be used after `close`."""
        except BaseException:
            runtime.close(self._number, self._address)
            raise

    def close(self) -> None:
        """Unmap. Nothing that reads the memory may be queued any more. Raises CudaError."""
        # An empty tensor: whoever uses the old one by mistake gets an error and no fault of the device.
        self.tensor = self.tensor.new_empty(0)
        self._runtime.close(self._number, self._address)


def _free(runtime: CudaRuntime, number: int, address: int) -> None:
    # Called by the collector, where nobody could take an error; a device that is broken gives nothing back.
    with contextlib.suppress(CudaError):
        runtime.free(number, address)


def _number(device: torch.device) -> int:
    """The device's number; the current one's where it says just "cuda"."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else 0


def _tensor(region: _Region, address: int, device: torch.device) -> torch.Tensor:
    """A view. torch copies what it takes to be on another device, and a pool's copy would be nobody's pool."""
    if device.type == "cuda":
        tensor = torch.as_tensor(region, device=torch.device("cuda", _number(device)))
    else:
        tensor = torch.from_numpy(np.asarray(region))
    if tensor.data_ptr() != address:
        raise CudaError(f"torch does not see memory of {device} where it is")
    return tensor
