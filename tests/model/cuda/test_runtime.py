"""Calls of the CUDA runtime: every error is told by name and forgotten by the runtime, and devices are put back."""

import ctypes
from pathlib import Path

import pytest

from kvbaton.model.cuda.runtime import HANDLE_BYTES, CudaError, CudaRuntime, loaded_libraries, wheel_libraries
from support.cudart import INVALID_VALUE, MAP_FAILED, OUT_OF_MEMORY, Gpus, Process


def test_memory_goes_from_one_process_to_another_and_back() -> None:
    gpus = Gpus()
    ours, theirs = Process(gpus), Process(gpus)
    address = theirs.runtime().malloc(1, 4096)
    handle = theirs.runtime().export(1, address)
    assert len(handle) == HANDLE_BYTES
    runtime = ours.runtime()
    mapped = runtime.open(1, handle)
    assert mapped == address
    assert runtime.extent(1, mapped) == 4096
    runtime.close(1, mapped)
    assert ours.opened == []
    theirs.runtime().free(1, address)
    assert gpus.allocations == {}


def test_calls_run_on_their_device_and_leave_the_threads_own_as_it_was() -> None:
    process = Process(Gpus(3))
    process.device = 2
    runtime = process.runtime()
    runtime.free(1, runtime.malloc(1, 64))
    assert [device for name, device in process.calls if name in ("cudaMalloc", "cudaFree")] == [1, 1]
    assert process.device == 2
    process.fail["cudaMalloc"] = OUT_OF_MEMORY
    with pytest.raises(CudaError):
        runtime.malloc(1, 64)
    assert process.device == 2


def test_an_error_has_the_functions_name_the_runtimes_text_and_its_number_and_is_not_remembered() -> None:
    process = Process(Gpus(capacity=100))
    with pytest.raises(CudaError, match=r"^cudaMalloc: out of memory \(error 2\)$"):
        process.runtime().malloc(0, 101)
    assert process.last_error == 0, "torch would take it for its own next kernel's"


@pytest.mark.parametrize(
    "name",
    [
        "cudaGetDevice",
        "cudaSetDevice",
        "cudaMalloc",
        "cudaFree",
        "cudaIpcGetMemHandle",
        "cudaIpcOpenMemHandle",
        "cudaIpcCloseMemHandle",
        "cudaDeviceCanAccessPeer",
        "cuMemGetAddressRange_v2",
    ],
)
def test_no_error_goes_unnoticed(name: str) -> None:
    gpus = Gpus()
    process, other = Process(gpus), Process(gpus)
    runtime, theirs = process.runtime(), other.runtime()
    handle = theirs.export(0, theirs.malloc(0, 64))
    process.fail[name] = MAP_FAILED

    def everything() -> None:
        runtime.can_access(0, 1)
        address = runtime.malloc(0, 64)
        runtime.export(0, address)
        mapped = runtime.open(0, handle)
        runtime.extent(0, mapped)
        runtime.close(0, mapped)
        runtime.free(0, address)

    with pytest.raises(CudaError, match=f"^{name}: .*{MAP_FAILED}"):
        everything()


def test_an_error_without_a_text_is_still_an_error() -> None:
    process = Process(Gpus())
    process.fail["cudaFree"] = 999
    with pytest.raises(CudaError, match=r"cudaFree: unknown \(error 999\)"):
        process.runtime().free(0, 1)


def test_a_handle_of_its_own_memory_cannot_be_opened_by_a_process() -> None:
    runtime = Process(Gpus()).runtime()
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: invalid resource handle"):
        runtime.open(0, runtime.export(0, runtime.malloc(0, 64)))


def test_an_address_that_is_none_cannot_be_exported() -> None:
    with pytest.raises(CudaError, match=rf"cudaIpcGetMemHandle: invalid argument \(error {INVALID_VALUE}\)"):
        Process(Gpus()).runtime().export(0, 4096)


def test_peer_access_is_asked_for_in_its_direction() -> None:
    gpus = Gpus()
    gpus.peers.add((0, 1))
    runtime = Process(gpus).runtime()
    assert runtime.can_access(0, 1)
    assert not runtime.can_access(1, 0)


def test_a_library_that_lacks_a_function_is_refused_at_once() -> None:
    process = Process(Gpus())
    del process.__dict__["cudaIpcOpenMemHandle"]
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle"):
        process.runtime()
    with pytest.raises(CudaError, match="function missing"):
        CudaRuntime(ctypes.CDLL(None), ctypes.CDLL(None))


def test_the_library_that_is_mapped_is_found(tmp_path: Path) -> None:
    wheel = "/venv/lib/python3.11/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12"
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r--p 00000000 08:01 1 {wheel}\n"
        f"7f01-7f02 r-xp 00001000 08:01 1 {wheel}\n"
        "7f02-7f03 r-xp 00001000 08:01 1 /venv/torch/lib/libcudart-d0da41ae.so.11.0\n"
        "7f03-7f04 r-xp 00001000 08:01 1 /usr/lib/libcuda.so.1\n"
        "7f04-7f05 rw-p 00000000 00:00 0\n"
    )
    assert loaded_libraries(maps) == [wheel, "/venv/torch/lib/libcudart-d0da41ae.so.11.0"]
    assert loaded_libraries(tmp_path / "none") == []


def test_the_library_is_found_in_the_wheels_beside_torch(tmp_path: Path) -> None:
    for folder, name in (
        ("cuda_runtime", "libcudart.so.12"),
        ("cu13", "libcudart.so.13"),
        ("cublas", "libcublas.so.12"),
    ):
        library = tmp_path / "nvidia" / folder / "lib" / name
        library.parent.mkdir(parents=True)
        library.touch()
    found = wheel_libraries(str(tmp_path / "torch"))
    assert [Path(path).name for path in found] == ["libcudart.so.13", "libcudart.so.12"]
