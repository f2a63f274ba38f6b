"""How large the KV pool is: what was asked for, or what the device has."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.model.cuda.runtime import CudaError
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.memory import Memory
from kvbaton.worker import kv_memory
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.kv_memory import (
    MAX_BLOCKS,
    allocate,
    auto_bytes,
    block_size_of,
    blocks_in,
    check_size,
    num_blocks_for,
)
from support import tiny_models

GIB = 1 << 30
GEOMETRY = KvGeometry((LayerGeometry(2, 4, 4), LayerGeometry(1, 8, 8)), "float32")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return load_model(str(folder), "float32", "cpu")


def has(monkeypatch: pytest.MonkeyPatch, total: int, available: int) -> None:
    monkeypatch.setattr(kv_memory, "memory_of", lambda device: Memory(total, available))


def test_a_memory_size_holds_whole_blocks() -> None:
    block = GEOMETRY.token_bytes * 16
    assert blocks_in(block * 3 + block - 1, GEOMETRY, 16) == 3
    assert blocks_in(1 << 40, GEOMETRY, 1) == MAX_BLOCKS


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_memory_for_no_block_is_refused(size: int) -> None:
    with pytest.raises(StartupError, match=f"--kv-memory: {size} bytes do not hold one block of"):
        blocks_in(size, GEOMETRY, 16)


@pytest.mark.parametrize("size", ["", "-1GiB", "1TiB", "much", "Auto"])
def test_a_size_that_is_none_is_refused_by_the_option(size: str) -> None:
    with pytest.raises(StartupError, match="--kv-memory: .* is no size"):
        check_size(size)


def test_a_size_and_auto_are_sizes() -> None:
    check_size("512MiB")
    check_size("auto")


@pytest.mark.parametrize(
    ("memory", "weights", "device", "share", "expected"),
    [
        # Half of a host, its weights within, and never more than 4 GiB.
        (Memory(8 * GIB, 7 * GIB), GIB, "cpu", 1.0, 3 * GIB),
        (Memory(64 * GIB, 60 * GIB), GIB, "cpu", 1.0, 4 * GIB),
        # Two workers that start together; the pages of their pools are taken later.
        (Memory(8 * GIB, 7 * GIB), GIB, "cpu", 0.5, GIB),
        # Somebody else has most of it.
        (Memory(8 * GIB, GIB), GIB, "cpu", 1.0, GIB // 2),
        (Memory(80 * GIB, 64 * GIB), 16 * GIB, "cuda", 1.0, 56 * GIB),
        (Memory(80 * GIB, 10 * GIB), 16 * GIB, "cuda", 1.0, 9 * GIB),
        # Of two on one GPU the second finds the first one's pool there.
        (Memory(80 * GIB, 64 * GIB), 16 * GIB, "cuda", 0.5, 20 * GIB),
        (Memory(80 * GIB, 28 * GIB), 16 * GIB, "cuda", 0.5, 20 * GIB),
        # The weights alone are more than was planned.
        (Memory(8 * GIB, 4 * GIB), 5 * GIB, "cpu", 1.0, 0),
    ],
)
def test_auto(memory: Memory, weights: int, device: str, share: float, expected: int) -> None:
    assert auto_bytes(memory, weights, device, share) == expected


@pytest.mark.parametrize(("device", "asked", "expected"), [("cpu", 0, 16), ("cuda:1", 0, 256), ("cuda", 64, 64)])
def test_blocks_are_of_the_asked_size_or_suit_the_device(device: str, asked: int, expected: int) -> None:
    assert block_size_of(WorkerConfig(device=device, block_size=asked)) == expected


def test_auto_takes_no_more_blocks_than_a_pool_has_and_says_nothing(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has(monkeypatch, 64 * GIB, 60 * GIB)
    assert num_blocks_for(WorkerConfig(block_size=1), loaded) == MAX_BLOCKS
    assert not caplog.records


def test_auto_where_nothing_is_left_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 1000, 1000)
    with pytest.raises(StartupError, match="--kv-memory: "):
        num_blocks_for(WorkerConfig(), loaded)


def test_a_pool_smaller_than_the_context_is_told(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    block = loaded.geometry.token_bytes * 16
    enough = WorkerConfig(kv_memory=str(block * 16))
    assert num_blocks_for(enough, loaded) * 16 == loaded.max_model_len
    assert not caplog.records
    assert num_blocks_for(replace(enough, kv_memory=str(block * 15)), loaded) == 15
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "holds 240 tokens and the model's context 256" in caplog.text


def test_a_pool_that_the_device_does_not_have_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 8 * GIB, 2 * GIB)
    num_blocks = 3 * GIB // (loaded.geometry.token_bytes * 16)
    with pytest.raises(StartupError) as caught:
        allocate(WorkerConfig(kv_memory="3GiB"), loaded, num_blocks)
    expected = "--kv-memory: the pool takes 3.00 GiB, and cpu has 2.00 GiB available of 8.00 GiB"
    assert str(caught.value) == expected


def test_a_pool_to_be_shared(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert allocate(WorkerConfig(), loaded, 4, shared=True).shared is not None
    assert allocate(WorkerConfig(), loaded, 4).shared is None
    assert not caplog.records
    monkeypatch.delattr(os, "memfd_create")
    assert allocate(WorkerConfig(), loaded, 4, shared=True).shared is None
    assert [record.getMessage() for record in caplog.records] == [
        "KV cannot be handed over by shared memory: this system has no memfd_create"
    ]


def test_a_device_that_refuses_the_pool_is_told_by_the_option(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CudaError("cudaMalloc: out of memory (error 2)")

    monkeypatch.setattr(kv_memory, "TorchKvStore", refuse)
    with pytest.raises(StartupError, match=r"^--kv-memory: .* cannot be allocated on cpu: cudaMalloc: out of memory"):
        allocate(WorkerConfig(), loaded, 3)
