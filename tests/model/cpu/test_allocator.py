"""The C library is asked for what it takes; tensors in large pages are ordinary ones that share nothing."""

import ctypes
import gc
import mmap
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvbaton.model.cpu.allocator import LargePages, keep_freed_memory


def test_tensors_do_not_overlap() -> None:
    pages = LargePages()
    shapes = [(3,), (5, 7), (1024, 1024), (0,), (9 << 20,), (2, 3, 4)]
    tensors = [pages.empty(shape, torch.float32) for shape in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert bool((tensor == number).all())
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()


def test_a_copy_is_contiguous() -> None:
    source = torch.arange(12.0).view(3, 4).T
    copy = LargePages().copy(source)
    assert torch.equal(copy, source)
    assert copy.is_contiguous()
    copy[0, 0] = 7
    assert source[0, 0] == 0


def test_memory_goes_with_its_last_tensor() -> None:
    pages = LargePages()
    first, second = pages.empty((16 << 20,), torch.uint8), pages.empty((4 << 20,), torch.uint8)
    storage = weakref.ref(first.untyped_storage())
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    del first
    second.fill_(1)
    del second, pages
    gc.collect()
    assert storage() is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel tells nothing about mappings")
def test_memory_is_the_process_s_own() -> None:
    """What is mapped as shared counts as a file in memory, for which most kernels have no large pages."""
    tensor = LargePages().empty((64 << 20,), torch.uint8)
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access = line.split()[:2]
        start, stop = (int(part, 16) for part in span.split("-"))
        if start <= address < stop:
            assert access == "rw-p"
            return
    pytest.fail("not mapped")


def test_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    LargePages().empty((64 << 20,), torch.uint8)


def test_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match="bytes of memory cannot be had"):
        LargePages().empty((1 << 60,), torch.uint8)


@pytest.mark.parametrize("largest", [1 << 30, 32 << 20])
def test_thresholds(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == -3 and value > largest:
            return 0
        taken[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert taken == {-3: largest, -1: 1 << 30}


def test_a_library_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()
