"""The C library is asked for what it takes."""

import ctypes
from types import SimpleNamespace

import pytest

from kvbaton.model.cpu.allocator import keep_freed_memory


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
