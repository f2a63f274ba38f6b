"""What is copied from another's pool is what lies there, and nothing that its owner says leads outside of it."""

import dataclasses
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.errors import TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.kv_store import SharedMemory
from kvbaton.engine.pool_layout import PoolLayout, layout_problem
from kvbaton.handoff.landing import fill
from kvbaton.model import foreign_pool, host_pool
from kvbaton.model.store import TorchKvStore

CPU = torch.device("cpu")
GEOMETRY = KvGeometry((LayerGeometry(2, 3, 2), LayerGeometry(1, 4, 4)), "bfloat16")
LAYERS = st.lists(st.builds(LayerGeometry, st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)), min_size=1)


def shared_store(geometry: KvGeometry = GEOMETRY, num_blocks: int = 6, block_size: int = 4) -> TorchKvStore:
    store = TorchKvStore(geometry, num_blocks, block_size, CPU, shared=True)
    store.memory.tensor.copy_(
        torch.from_numpy(np.random.default_rng(3).integers(0, 256, len(store.memory.tensor), np.uint8))
    )
    return store


def shared(store: TorchKvStore) -> SharedMemory:
    assert store.shared is not None
    return store.shared


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    yield descriptor
    os.close(descriptor)


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kvbaton")


@pytest.fixture(params=[True, False])
def _by_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(host_pool, "has_crc32c_unit", lambda: False)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_copy_is_what_the_wire_would_bring(data: st.DataObject) -> None:
    geometry = KvGeometry(tuple(data.draw(LAYERS)), data.draw(st.sampled_from(sorted(DTYPE_BYTES))))
    sizes = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    theirs = shared_store(geometry, 8, sizes[0])
    ours, expected = (TorchKvStore(geometry, 8, sizes[1], CPU) for _ in range(2))
    for store in (ours, expected):
        store.memory.tensor.zero_()
    stop = data.draw(st.integers(1, 8 * min(sizes)))
    start = data.draw(st.integers(0, stop - 1))
    there, here = (data.draw(st.permutations(range(8))) for _ in range(2))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(geometry.layers))] * 2)))
    layers, tokens = range(low, high), range(start, stop)
    payload = b"".join(theirs.read(layers, there, tokens))
    fill(expected.landing(layers, here, tokens), payload)

    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    # It may say more than is needed.
    found = foreign.copy(layers, there[start // sizes[0] :], tokens, here)
    foreign.close()
    assert found == crc32c(payload) == theirs.checksum(layers, there, tokens) == ours.checksum(layers, here, tokens)
    assert torch.equal(ours.memory.tensor, expected.memory.tensor)


@pytest.mark.usefixtures("_by_kernel")
def test_both_ways_of_copying() -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    payload = b"".join(theirs.read(range(2), [5, 0, 3], range(1, 10)))
    assert foreign.copy(range(2), (5, 0, 3), range(1, 10), [2, 0]) == crc32c(payload)
    assert b"".join(ours.read(range(2), [2, 0], range(1, 10))) == payload
    assert theirs.checksum(range(2), [5, 0, 3], range(1, 10)) == crc32c(payload)
    foreign.close()


def test_no_tokens() -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    assert foreign.copy(range(2), [], range(3, 3), [1]) == ours.checksum(range(2), [1], range(3, 3)) == 0
    foreign.close()


@pytest.mark.parametrize("blocks", [(6, 0), (0, 6), (4_294_967_295, 0), (-1, 0), (0,), ()])
def test_blocks_that_the_sender_does_not_have(blocks: tuple[int, ...]) -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    ours.memory.tensor.zero_()
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    with pytest.raises(TransferRejectedError, match="reference: "):
        foreign.copy(range(2), blocks, range(8), [0, 1, 2])
    foreign.close()
    assert not ours.memory.tensor.any()


@settings(deadline=None)
@given(st.data())
def test_a_layout_that_lies_is_refused_or_harmless(data: st.DataObject) -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    truth, descriptor = shared(theirs).layout, shared(theirs).descriptor
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(PoolLayout)]))
    near = st.integers(max(0, truth.num_bytes - 600), truth.num_bytes + 600)
    number = st.one_of(st.integers(0, 600), near, st.integers(0, (1 << 64) - 1))
    value: Any = data.draw(number)
    if field.endswith("offsets"):
        value = tuple(data.draw(st.lists(number, max_size=3)))
    lie = dataclasses.replace(truth, **{field: value})
    if layout_problem(lie, GEOMETRY) is not None or lie.num_bytes > truth.num_bytes:
        with pytest.raises(UnavailableError, match="the sender's memory: "):
            ours.map_foreign(descriptor, lie)
        return
    foreign = ours.map_foreign(descriptor, lie)
    # Whatever it means, it lies within the memory.
    last = lie.num_blocks - 1
    foreign.copy(range(2), [last] * 8, range(8), [2])
    foreign.probe(lie.probe_bytes)
    with pytest.raises(UnavailableError, match="a probe of"):
        foreign.probe(lie.probe_bytes + 1)
    foreign.close()


def test_memory_that_its_owner_could_cut_is_refused(memfd: int, tmp_path: Path) -> None:
    layout = shared(shared_store()).layout
    ours = TorchKvStore(GEOMETRY, 3, 8, CPU)
    os.truncate(memfd, layout.num_bytes)
    with pytest.raises(UnavailableError, match="not sealed against becoming smaller"):
        ours.map_foreign(memfd, layout)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    ours.map_foreign(memfd, layout).close()
    with (tmp_path / "file").open("wb") as file:
        file.truncate(layout.num_bytes)
        with pytest.raises(UnavailableError, match="not a file in memory|not sealed"):
            ours.map_foreign(file.fileno(), layout)
    for descriptor in os.pipe():
        with pytest.raises(UnavailableError, match="not sealed"):
            ours.map_foreign(descriptor, layout)
        os.close(descriptor)
    with pytest.raises(UnavailableError, match="not a file in memory"):
        ours.map_foreign(-1, layout)


def test_memory_smaller_than_its_layout(memfd: int) -> None:
    layout = shared(shared_store()).layout
    os.truncate(memfd, layout.num_bytes - 1)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(UnavailableError, match=f"{layout.num_bytes - 1} bytes, of which the layout names"):
        TorchKvStore(GEOMETRY, 3, 8, CPU).map_foreign(memfd, layout)


def test_a_probe() -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    pattern = os.urandom(1 << 20)
    shared(theirs).probe[: 1 << 20] = pattern
    found, seconds = foreign.probe(1 << 20)
    assert found == crc32c(pattern)
    assert seconds > 0
    foreign.close()


def test_nothing_is_left_of_a_mapping() -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    before, mapped = os.listdir("/proc/self/fd"), maps()
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    assert maps() == mapped + 1
    foreign.probe(100)
    foreign.copy(range(2), [1], range(4), [2])
    foreign.close()
    foreign.close()
    assert maps() == mapped
    assert os.listdir("/proc/self/fd") == before
    for use in (lambda: foreign.probe(1), lambda: foreign.copy(range(2), [1], range(4), [2])):
        with pytest.raises(UnavailableError, match="the link has ended"):
            use()


def test_it_is_mapped_while_a_copy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    copied = host_pool.copied

    def slowly(*arguments: Any) -> int:
        begun.set()
        assert go_on.wait(10)
        assert not closed.is_set()
        return copied(*arguments)

    monkeypatch.setattr(foreign_pool, "copied", slowly)
    copying = threading.Thread(target=foreign.copy, args=(range(2), [1], range(4), [2]))

    def close() -> None:
        foreign.close()
        closed.set()

    closing = threading.Thread(target=close)
    copying.start()
    assert begun.wait(10)
    closing.start()
    go_on.set()
    copying.join()
    closing.join()
    assert closed.is_set()


def test_the_mapping_is_read_only() -> None:
    theirs, ours = shared_store(), TorchKvStore(GEOMETRY, 3, 8, CPU)
    foreign = ours.map_foreign(shared(theirs).descriptor, shared(theirs).layout)
    assert isinstance(foreign._memory, mmap.mmap)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:kvbaton" in line]
    assert sorted(line.split()[1] for line in lines).count("r--s") == 1
    foreign.close()
