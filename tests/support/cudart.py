"""A CUDA without a GPU: the functions that are called by ctypes, over host memory, and streams that note what they do.

Functions are real foreign functions to ctypes, so that arguments are converted as they are for the library.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from kvbaton.model.cuda.pinned import Event
from kvbaton.model.cuda.runtime import HANDLE_BYTES, CudaRuntime, IpcHandle

OUT_OF_MEMORY, INVALID_VALUE, MAP_FAILED, NO_HANDLE = 2, 1, 205, 400
TEXTS = {OUT_OF_MEMORY: b"out of memory", INVALID_VALUE: b"invalid argument", NO_HANDLE: b"invalid resource handle"}

_INT = ctypes.POINTER(ctypes.c_int)
_POINTER = ctypes.POINTER(ctypes.c_void_p)


class Gpus:
    """Memory and peers of some devices, shared by all processes."""

    def __init__(self, num_devices: int = 2, capacity: int = 64 << 20) -> None:
        self.num_devices, self.capacity = num_devices, capacity
        self.allocations: dict[int, Any] = {}
        self.peers: set[tuple[int, int]] = set()
        self.exported: dict[bytes, tuple[Process, int]] = {}


class Process:
    """One process's view of the GPUs. It can stand for `libcudart` and for `libcuda`."""

    def __init__(self, gpus: Gpus) -> None:
        self.gpus, self.device, self.last_error = gpus, 0, 0
        self.opened: list[int] = []
        self.calls: list[tuple[str, int]] = []
        """Functions in the order of their calls, and the device that was current."""
        self.fail: dict[str, int] = {}
        """Error codes that functions return in place of doing anything."""
        self.extent: int | None = None
        """What the driver says of an allocation's size; None for the truth."""
        self._define("cudaGetDevice", self._get_device, _INT)
        self._define("cudaSetDevice", self._set_device, ctypes.c_int)
        self._define("cudaMalloc", self._malloc, _POINTER, ctypes.c_size_t)
        self._define("cudaFree", self._free, ctypes.c_void_p)
        self._define("cudaIpcGetMemHandle", self._export, ctypes.POINTER(IpcHandle), ctypes.c_void_p)
        self._define("cudaIpcOpenMemHandle", self._import, _POINTER, IpcHandle, ctypes.c_uint)
        self._define("cudaIpcCloseMemHandle", self._close, ctypes.c_void_p)
        self._define("cudaDeviceCanAccessPeer", self._can_access, _INT, ctypes.c_int, ctypes.c_int)
        self._define("cudaGetLastError", self._take_last_error)
        sizes = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64
        self._define("cuMemGetAddressRange_v2", self._address_range, *sizes)
        # Texts are the library's own; as a pointer, since a callback cannot return one of Python's.
        self._texts = {code: ctypes.create_string_buffer(text) for code, text in TEXTS.items()}
        address = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)
        self.cudaGetErrorString = address(lambda code: ctypes.addressof(self._texts[code]) if code in TEXTS else None)

    def runtime(self) -> CudaRuntime:
        return CudaRuntime(self, self)

    @property
    def names(self) -> list[str]:
        """Functions called, without those that set devices."""
        return [name for name, _ in self.calls if not name.endswith("Device")]

    def _define(self, name: str, function: Callable[..., int], *arguments: Any) -> None:
        def call(*values: Any) -> int:
            self.calls.append((name, self.device))
            code = self.fail.get(name, 0) or function(*values)
            if name != "cudaGetLastError":
                self.last_error = code or self.last_error
            return code

        setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call))

    def _get_device(self, number: Any) -> int:
        number[0] = self.device
        return 0

    def _set_device(self, number: int) -> int:
        self.device = number
        return 0

    def _malloc(self, pointer: Any, size: int) -> int:
        if size + sum(map(ctypes.sizeof, self.gpus.allocations.values())) > self.gpus.capacity:
            return OUT_OF_MEMORY
        memory = (ctypes.c_uint8 * size)()
        pointer[0] = ctypes.addressof(memory)
        self.gpus.allocations[ctypes.addressof(memory)] = memory
        return 0

    def _free(self, address: int) -> int:
        return 0 if self.gpus.allocations.pop(address, None) is not None else INVALID_VALUE

    def _export(self, handle: Any, address: int) -> int:
        if address not in self.gpus.allocations:
            return INVALID_VALUE
        name = address.to_bytes(8, "little") + bytes(range(1, HANDLE_BYTES - 7))
        self.gpus.exported[name] = self, address
        ctypes.memmove(handle, name, HANDLE_BYTES)
        return 0

    def _import(self, pointer: Any, handle: IpcHandle, flags: int) -> int:
        owner, address = self.gpus.exported.get(bytes(handle), (self, 0))
        if owner is self or flags != 1:
            return NO_HANDLE
        pointer[0] = address
        self.opened.append(address)
        return 0

    def _close(self, address: int) -> int:
        if address not in self.opened:
            return INVALID_VALUE
        self.opened.remove(address)
        return 0

    def _can_access(self, answer: Any, device: int, peer: int) -> int:
        answer[0] = (device, peer) in self.gpus.peers
        return 0

    def _address_range(self, base: Any, size: Any, address: int) -> int:
        base[0] = address
        size[0] = ctypes.sizeof(self.gpus.allocations[address]) if self.extent is None else self.extent
        return 0

    def _take_last_error(self) -> int:
        code, self.last_error = self.last_error, 0
        return code


class FakeEvent:
    """An event of a `FakeStream`; it has passed unless a test says otherwise."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.passed = log, name, True

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")
        self.passed = True


class FakeStream:
    """A queue that does everything at once, and notes in which order it was told what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.events: list[FakeEvent] = []
        self.events_pass = True
        self.pinned_sizes: list[int] = []

    def running(self) -> AbstractContextManager[object]:
        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            self.log.append(f"{self.name} works")
            yield

        return noted()

    def record(self) -> Event:
        return self._event(f"{self.name} {len(self.events)}")

    def mark_engine(self) -> Event:
        return self._event(f"engine {len(self.events)}")

    def follow(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self.log.append(f"{self.name} follows {event.name}")

    def follow_engine(self) -> None:
        self.log.append(f"{self.name} follows the engine")

    def lead_engine(self) -> None:
        self.log.append(f"the engine follows {self.name}")

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.pinned_sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _event(self, name: str) -> FakeEvent:
        event = FakeEvent(self.log, name)
        event.passed = self.events_pass
        self.events.append(event)
        return event
