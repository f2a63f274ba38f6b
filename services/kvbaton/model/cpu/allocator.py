"""Where memory comes from: what a step uses and frees again, and what stays, weights and KV."""

import contextlib
import ctypes
import math
import mmap
import threading

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD = 1 << 30
_OLD_THRESHOLD = 32 << 20
"""The most that glibc took before 2.35; it refuses more, and would stay at 128 KiB."""


def keep_freed_memory() -> None:
    """Let freed memory be used again instead of returning it to the kernel at once. Harmless where there is no glibc.

    By default glibc maps each large block anew, and the kernel zeroes its pages one fault at a time: at 512 tokens of a
    model 1024 wide that makes an elementwise operation four to eight times as slow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD) or mallopt(_M_MMAP_THRESHOLD, _OLD_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)


_CHUNK = 32 << 20
_LINE = 64


class LargePages:
    """Tensors in memory that the kernel may map by pages of 2 MiB. Any thread may ask.

    What is read through at every step, gigabytes of it, needs an address translation for each page: with large ones the
    packed products were measured 5 to 12 % faster. Small tensors share mappings, which go when the last of them does.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that nobody else has; its values are anything. Raises RuntimeError when there is no memory."""
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if num_bytes > _CHUNK:
                part = mapped(num_bytes)
            else:
                if num_bytes > len(self._chunk):
                    self._chunk = mapped(_CHUNK)
                part, self._chunk = self._chunk[:num_bytes], self._chunk[-(-num_bytes // _LINE) * _LINE :]
        return part.view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, contiguous."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def mapped(num_bytes: int, descriptor: int | None = None) -> torch.Tensor:
    """New memory, or a file's, shared with whoever maps it too: [num_bytes], uint8.

    The kernel gives pages of 2 MiB where it has any: for new memory by transparent_hugepage/enabled, for a file in
    memory by transparent_hugepage/shmem_enabled, which is often "never". Raises RuntimeError when there is not so much.
    """
    try:
        if descriptor is None:
            memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise RuntimeError(f"{num_bytes} bytes of memory cannot be had: {error}") from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        # A kernel may be built without them.
        with contextlib.suppress(OSError):
            memory.madvise(advice)
    # The tensor keeps the mapping.
    return torch.frombuffer(memory, dtype=torch.uint8)
