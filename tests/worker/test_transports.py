"""What `--transport` may be is known from a worker's other options alone."""

import os

import pytest

from kvbaton.engine.errors import StartupError
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.transports import check_transport


@pytest.mark.parametrize(
    ("transport", "device"),
    [
        ("auto", "cpu"),
        ("auto", "cuda:1"),
        ("grpc", "cpu"),
        ("grpc", "cuda"),
        ("shared_memory", "cpu"),
        ("cuda_ipc", "cuda:1"),
    ],
)
def test_what_can_be(transport: str, device: str) -> None:
    check_transport(WorkerConfig(transport=transport, device=device))


@pytest.mark.parametrize(
    ("transport", "device", "problem"),
    [
        ("cuda_ipc", "cpu", "--transport: cuda_ipc needs KV on a GPU, and --device is cpu"),
        ("shared_memory", "cuda:1", "--transport: shared_memory needs KV in host memory, and --device is cuda:1"),
    ],
)
def test_what_cannot_be_ends_the_start(transport: str, device: str, problem: str) -> None:
    with pytest.raises(StartupError, match=problem):
        check_transport(WorkerConfig(transport=transport, device=device))


def test_a_system_without_memory_files_shares_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    check_transport(WorkerConfig())
    with pytest.raises(StartupError, match="no memory files"):
        check_transport(WorkerConfig(transport="shared_memory"))
