"""A shared pool is one sealed file without a name: others read it, nobody cuts it, and it goes with its last user."""

import errno
import fcntl
import gc
import mmap
import os
from pathlib import Path

import pytest
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.model import pool_memory as module
from kvbaton.model.pool_memory import PoolMemory, pool_memory
from kvbaton.model.store import PROBE_BYTES, TorchKvStore

CPU = torch.device("cpu")
SIZE = 3 << 20
GEOMETRY = KvGeometry((LayerGeometry(2, 3, 2), LayerGeometry(1, 4, 4)), "bfloat16")


def shared() -> tuple[PoolMemory, int]:
    """Memory, and its descriptor."""
    memory = pool_memory(SIZE, CPU, shared=True)
    assert memory.descriptor is not None, memory.obstacle
    return memory, memory.descriptor


def maps() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:kvbaton" in line]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_what_is_written_is_seen_by_who_maps_it() -> None:
    memory, descriptor = shared()
    with mmap.mmap(descriptor, SIZE, prot=mmap.PROT_READ) as view:
        memory.tensor[12345] = 77
        assert view[12345] == 77


def test_nobody_else_writes() -> None:
    _, descriptor = shared()
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptor, b"x")
    # Not even who opens it anew: the owner may, by its mode.
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, SIZE)
        with pytest.raises(PermissionError):
            os.write(again, b"x")
        with pytest.raises(PermissionError):
            os.truncate(again, SIZE - 1)
        with pytest.raises(PermissionError):
            os.truncate(again, SIZE + 1)
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(again)


def test_its_mode_is_its_owner_s() -> None:
    _, descriptor = shared()
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600


def test_it_takes_memory_when_it_is_written() -> None:
    memory = pool_memory(1 << 36, CPU, shared=True)
    assert memory.descriptor is not None, memory.obstacle
    assert os.fstat(memory.descriptor).st_blocks == 0
    memory.tensor[1 << 35] = 1
    assert 0 < os.fstat(memory.descriptor).st_blocks * 512 <= 2 << 20


def test_nothing_is_left_of_it() -> None:
    gc.collect()
    before, mapped = descriptors(), len(maps())
    memory, _ = shared()
    tensor = memory.tensor[5:9].fill_(3)
    assert len(maps()) == mapped + 1
    del memory
    assert len(maps()) == mapped + 1
    assert tensor.tolist() == [3] * 4
    del tensor
    gc.collect()
    assert descriptors() == before
    assert len(maps()) == mapped


def test_more_than_there_is() -> None:
    before = descriptors()
    with pytest.raises(RuntimeError, match="bytes of memory cannot be had"):
        pool_memory(1 << 60, CPU, shared=True)
    assert descriptors() == before


def test_memory_of_one_s_own() -> None:
    memory = pool_memory(SIZE, CPU, shared=False)
    assert memory.descriptor is None
    assert memory.tensor.shape == (SIZE,)
    assert memory.obstacle


def test_a_system_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    memory = pool_memory(SIZE, CPU, shared=True)
    assert (memory.descriptor, memory.tensor.shape) == (None, (SIZE,))
    assert "not here" in memory.obstacle
    monkeypatch.delattr(os, "memfd_create")
    memory = pool_memory(SIZE, CPU, shared=True)
    assert (memory.descriptor, memory.tensor.shape) == (None, (SIZE,))
    assert "memfd_create" in memory.obstacle


def test_an_older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    create, flags_seen = os.memfd_create, []

    def without_flag(name: str, flags: int) -> int:
        flags_seen.append(flags)
        if flags & 0x8:
            raise OSError(errno.EINVAL, "unknown flag")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", without_flag)
    monkeypatch.setattr(module, "_F_SEAL_FUTURE_WRITE", 1 << 30)
    _, descriptor = shared()
    assert len(flags_seen) == 2
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def test_a_store_s_tensors_lie_where_its_layout_says() -> None:
    store = TorchKvStore(GEOMETRY, 5, 4, CPU, shared=True)
    assert store.shared is not None
    layout = store.shared.layout
    assert (layout.block_size, layout.num_blocks, layout.probe_bytes) == (4, 5, PROBE_BYTES)
    store.shared.probe[:] = bytes(PROBE_BYTES)
    for number, tensor in enumerate([*store.keys, *store.values]):
        tensor.view(torch.uint8).fill_(number + 1)
    with mmap.mmap(store.shared.descriptor, layout.num_bytes, prot=mmap.PROT_READ) as view:
        assert view[layout.probe_offset :][: layout.probe_bytes] == bytes(PROBE_BYTES)
        for number, offset in enumerate([*layout.k_offsets, *layout.v_offsets]):
            size = [*store.keys, *store.values][number].nbytes
            assert view[offset : offset + size] == bytes([number + 1]) * size


def test_a_store_of_one_s_own() -> None:
    store = TorchKvStore(GEOMETRY, 5, 4, CPU)
    assert store.shared is None
    assert store.layout.probe_bytes == 0
