"""The few functions of the CUDA runtime that torch has no names for: memory of our own, and other processes'.

Signatures are those of cuda_runtime_api.h, and of cuda.h for the driver's one function. The library is the one that
torch has loaded, so that both speak of the same contexts and of the same current device of a thread.
"""

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE."""

_LAZY_ENABLE_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess: the one flag there is, and it must be given."""

_DRIVER = "libcuda.so.1"
_LOADED = re.compile(r"\S*/libcudart[^/\s]*\.so[.\d]*$")


class CudaError(RuntimeError):
    """A function of CUDA said no. A RuntimeError, as torch's own errors are."""


class IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t: 64 bytes that mean something to the driver alone. Passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


_POINTER = ctypes.c_void_p
_RUNTIME: dict[str, tuple[Any, ...]] = {
    "cudaGetDevice": (ctypes.POINTER(ctypes.c_int),),
    "cudaSetDevice": (ctypes.c_int,),
    "cudaMalloc": (ctypes.POINTER(_POINTER), ctypes.c_size_t),
    "cudaFree": (_POINTER,),
    "cudaIpcGetMemHandle": (ctypes.POINTER(IpcHandle), _POINTER),
    "cudaIpcOpenMemHandle": (ctypes.POINTER(_POINTER), IpcHandle, ctypes.c_uint),
    "cudaIpcCloseMemHandle": (_POINTER,),
    "cudaDeviceCanAccessPeer": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cudaGetLastError": (),
}
"""Arguments of the runtime's functions; each returns a cudaError_t, 0 for success."""

_ADDRESS_RANGE = "cuMemGetAddressRange_v2"
"""The driver's: base and size of the allocation that an address lies in. The runtime has no name for it."""


class CudaRuntime:
    """Checked calls. Devices are numbered as torch numbers them. Any thread may call."""

    def __init__(self, runtime: Any, driver: Any) -> None:
        """`runtime` is libcudart, `driver` libcuda, by ctypes. Raises CudaError when one lacks a function."""
        self._runtime, self._driver = runtime, driver
        try:
            for name, arguments in _RUNTIME.items():
                _declare(getattr(runtime, name), ctypes.c_int, arguments)
            _declare(runtime.cudaGetErrorString, ctypes.c_char_p, (ctypes.c_int,))
            sizes = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64
            _declare(getattr(driver, _ADDRESS_RANGE), ctypes.c_int, sizes)
        except AttributeError as error:
            raise CudaError(f"this CUDA has a function missing: {error}") from error

    def malloc(self, device: int, num_bytes: int) -> int:
        """Address of fresh memory, which is not initialised."""
        pointer = ctypes.c_void_p()
        with self._on(device):
            self._check("cudaMalloc", ctypes.byref(pointer), num_bytes)
        assert pointer.value
        return pointer.value

    def free(self, device: int, address: int) -> None:
        """Give back what `malloc` gave. Waits for what the device has been told to do."""
        with self._on(device):
            self._check("cudaFree", address)

    def export(self, device: int, address: int) -> bytes:
        """What another process opens memory of `malloc` by. It may be asked for any number of times."""
        handle = IpcHandle()
        with self._on(device):
            self._check("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's memory on `device`, where it lies; its address here."""
        pointer = ctypes.c_void_p()
        by_value = IpcHandle.from_buffer_copy(handle)
        with self._on(device):
            self._check("cudaIpcOpenMemHandle", ctypes.byref(pointer), by_value, _LAZY_ENABLE_PEER_ACCESS)
        assert pointer.value
        return pointer.value

    def close(self, device: int, address: int) -> None:
        """Unmap what `open` mapped. No kernel may be using it."""
        with self._on(device):
            self._check("cudaIpcCloseMemHandle", address)

    def extent(self, device: int, address: int) -> int:
        """Bytes from `address` to the end of the allocation that it lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._on(device):
            code = getattr(self._driver, _ADDRESS_RANGE)(ctypes.byref(base), ctypes.byref(size), address)
        if code:
            raise CudaError(f"{_ADDRESS_RANGE}: error {code}")
        return base.value + size.value - address

    def can_access(self, device: int, peer: int) -> bool:
        """Whether `device` can read the memory of `peer` directly."""
        answer = ctypes.c_int()
        self._check("cudaDeviceCanAccessPeer", ctypes.byref(answer), device, peer)
        return bool(answer.value)

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """Make `device` this thread's current one meanwhile."""
        before = ctypes.c_int()
        self._check("cudaGetDevice", ctypes.byref(before))
        self._check("cudaSetDevice", device)
        try:
            yield
        finally:
            self._check("cudaSetDevice", before.value)

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._runtime, name)(*arguments)
        if code:
            # The runtime remembers an error, and torch would take it for that of the next kernel it launches.
            self._runtime.cudaGetLastError()
            text = self._runtime.cudaGetErrorString(code) or b"unknown"
            raise CudaError(f"{name}: {text.decode(errors='replace')} (error {code})")


def _declare(function: Any, result: Any, arguments: tuple[Any, ...]) -> None:
    function.restype, function.argtypes = result, arguments


@functools.cache
def cuda_runtime() -> CudaRuntime:
    """The runtime that torch uses. Raises CudaError when it is not to be found."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    try:
        return CudaRuntime(_library(), ctypes.CDLL(_DRIVER))
    except OSError as error:
        raise CudaError(f"libraries of CUDA: {error}") from error


def _library() -> ctypes.CDLL:
    """libcudart: as it is mapped here; else by the name that the linker knows it by; else as wheels bring it."""
    version = (torch.version.cuda or "").partition(".")[0]
    names = [*loaded_libraries(Path("/proc/self/maps")), f"libcudart.so.{version}", *wheel_libraries(torch.__path__[0])]
    problems: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problems.append(str(error))
    raise CudaError(f"libcudart is not to be found: {'; '.join(problems)}")


def loaded_libraries(maps: Path) -> list[str]:
    """Paths of every libcudart that a process has mapped, from its /proc/PID/maps; none where there is no such file."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    found = (_LOADED.search(line) for line in lines)
    return list(dict.fromkeys(match.group() for match in found if match))


def wheel_libraries(torch_folder: str) -> list[str]:
    """Paths of libcudart in the wheels beside torch: nvidia/cuda_runtime/lib, or nvidia/cu13/lib from CUDA 13 on."""
    return sorted(map(str, Path(torch_folder).parent.glob("nvidia/*/lib/libcudart.so.*")))
