"""Memory of cudaMalloc lives as long as a tensor looks at it; another process's is mapped, checked, unmapped once."""

import gc
import re

import pytest
import torch

from kvbaton.model import pool_memory
from kvbaton.model.cuda import device_memory
from kvbaton.model.cuda.device_memory import Mapping, _tensor, allocate
from kvbaton.model.cuda.runtime import CudaError
from support.cudart import Gpus, Process

# Host memory stands in for the device's; the calls and their order are those of a GPU.
DEVICE = torch.device("cpu", 0)


def test_the_last_view_frees_the_memory() -> None:
    gpus = Gpus()
    memory = allocate(Process(gpus).runtime(), DEVICE, 3000)
    assert memory.shape == (3000,)
    assert memory.dtype is torch.uint8
    view = memory[512:1024].view(torch.bfloat16).view(2, -1)
    del memory
    gc.collect()
    view.fill_(1)
    assert len(gpus.allocations) == 1
    del view
    gc.collect()
    assert gpus.allocations == {}


def test_an_allocation_has_whole_granules_so_that_nobody_elses_is_exported_with_it() -> None:
    gpus = Gpus()
    memory = allocate(Process(gpus).runtime(), DEVICE, (2 << 20) + 1)
    assert [len(allocation) for allocation in gpus.allocations.values()] == [4 << 20]
    assert len(memory) == (2 << 20) + 1


def test_what_torch_keeps_for_later_is_asked_for_before_memory_is_said_to_be_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = Gpus(capacity=2 << 20)
    process = Process(gpus)
    cached = process.runtime().malloc(0, 4096)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: process.runtime().free(0, cached))
    assert len(allocate(process.runtime(), DEVICE, 2 << 20)) == 2 << 20


def test_a_device_that_has_not_the_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(CudaError, match="cudaMalloc: out of memory"):
        allocate(Process(Gpus(capacity=100)).runtime(), DEVICE, 101)


def test_a_device_that_fails_when_memory_is_freed_raises_nothing_in_the_collector() -> None:
    process = Process(Gpus())
    memory = allocate(process.runtime(), DEVICE, 10)
    process.fail["cudaFree"] = 700
    del memory
    gc.collect()
    assert process.names[-2:] == ["cudaFree", "cudaGetLastError"]


def exported(gpus: Gpus, num_bytes: int) -> tuple[torch.Tensor, bytes]:
    runtime = Process(gpus).runtime()
    memory = allocate(runtime, DEVICE, num_bytes)
    return memory, runtime.export(0, memory.data_ptr())


def test_a_mapping_sees_what_the_owner_writes() -> None:
    gpus = Gpus()
    process = Process(gpus)
    memory, handle = exported(gpus, 5000)
    mapping = Mapping(process.runtime(), DEVICE, handle, 5000)
    memory[4999] = 7
    assert mapping.tensor[4999] == 7
    mapping.close()
    assert process.opened == []
    assert len(mapping.tensor) == 0


def test_a_peer_that_says_it_has_more_than_it_has_is_not_believed_and_nothing_stays_mapped() -> None:
    gpus = Gpus()
    process = Process(gpus)
    memory, handle = exported(gpus, 5000)
    size = 2 << 20
    with pytest.raises(CudaError, match=re.escape(f"{size + 1} bytes of an allocation that has {size}")):
        Mapping(process.runtime(), DEVICE, handle, size + 1)
    assert process.opened == []
    assert len(memory) == 5000


def test_a_mapping_whose_size_cannot_be_told_is_undone() -> None:
    gpus = Gpus()
    process = Process(gpus)
    _memory, handle = exported(gpus, 5000)
    process.fail["cuMemGetAddressRange_v2"] = 1
    with pytest.raises(CudaError, match="cuMemGetAddressRange_v2: error 1"):
        Mapping(process.runtime(), DEVICE, handle, 5000)
    assert process.opened == []


def test_a_handle_that_means_nothing_is_an_error() -> None:
    process = Process(Gpus())
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle"):
        Mapping(process.runtime(), DEVICE, bytes(64), 1)


def test_a_pool_on_a_gpu_is_one_allocation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus()
    monkeypatch.setattr(pool_memory, "cuda_runtime", Process(gpus).runtime)
    monkeypatch.setattr(device_memory, "_tensor", lambda region, address, device: _tensor(region, address, DEVICE))
    memory = pool_memory.pool_memory(5000, torch.device("cuda", 0), shared=True)
    assert memory.obstacle == ""
    assert memory.descriptor is None
    assert list(gpus.allocations) == [memory.tensor.data_ptr()]


def test_without_a_runtime_the_pool_is_torchs_and_cannot_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise CudaError("libcudart is not to be found")

    monkeypatch.setattr(pool_memory, "cuda_runtime", missing)
    memory = pool_memory.pool_memory(5000, torch.device("meta"), shared=True)
    assert memory.obstacle == "libcudart is not to be found"
    assert len(memory.tensor) == 5000
