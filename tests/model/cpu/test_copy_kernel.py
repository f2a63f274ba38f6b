"""Runs are copied byte by byte, nothing beside them is touched, and the checksum is the library's."""

from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.runs import slot_runs
from kvbaton.model.cpu.copy_kernel import copy_runs, pair_runs
from kvbaton.model.cpu.crc32c_kernel import NOTHING, STREAM, WRITE, has_crc32c_unit, zeros_table
from kvbaton.model.host_pool import copied_by_library

WAYS: list[Any] = [copied_by_library, *([copy_runs] if has_crc32c_unit() else [])]
MODES = [NOTHING, WRITE, STREAM]
# Around what three pieces take, short ones and long, and around a line.
EDGES = [0, 1, 7, 8, 9, 63, 64, 65, 767, 768, 769, 832, 12287, 12288, 12289, 13056, 40000]


def random_bytes(size: int) -> Any:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", EDGES)
def test_one_run(way: Any, mode: int, size: int) -> None:
    for shift in (0, 1, 36):
        source, target = random_bytes(size + 100), random_bytes(size + 200)
        expected, first = target.copy(), 3 * shift
        wanted = source[shift : shift + size].tobytes()
        planes = np.array([[source.ctypes.data + shift, target.ctypes.data + first, 1]])
        if mode == NOTHING:
            # There is no target but the source.
            planes[0, 1] = planes[0, 0]
        else:
            expected[first : first + size] = source[shift : shift + size]
        assert way(planes, np.array([[0, 0, size]]), mode) == crc32c(wanted)
        assert (target == expected).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_many_runs_of_many_planes(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    slots = 64
    memory = [(random_bytes(width * slots), np.zeros(width * slots, np.uint8), width) for width in widths]
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    starts = data.draw(st.permutations(range(4)))[: len(lengths)]
    sources = [data.draw(st.integers(0, slots - length)) for length in lengths]
    runs = np.array([(a, 16 * b, n) for a, b, n in zip(sources, starts, lengths, strict=True)])
    planes = np.array([[source.ctypes.data, target.ctypes.data, width] for source, target, width in memory])
    payload, expected = b"", []
    for source, target, width in memory:
        image = target.copy()
        for first, place, count in runs:
            part = source[first * width : (first + count) * width]
            payload += part.tobytes()
            image[place * width : (place + count) * width] = part
        expected.append(image)
    for way in WAYS:
        for _, target, _ in memory:
            target[:] = 0
        assert way(planes, runs, STREAM) == crc32c(payload)
        assert all((target == image).all() for (_, target, _), image in zip(memory, expected, strict=True))


@settings(deadline=None)
@given(st.data())
def test_runs_of_two_pools(data: st.DataObject) -> None:
    sizes = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stop = data.draw(st.integers(1, 30))
    start = data.draw(st.integers(0, stop - 1))
    lists = [data.draw(st.permutations(range(31)))[: -(-stop // size)] for size in sizes]
    cut = [np.array(blocks[start // size :]) for blocks, size in zip(lists, sizes, strict=True)]
    runs = pair_runs(cut[0], sizes[0], cut[1], sizes[1], start, stop)
    for column, (blocks, size) in enumerate(zip(lists, sizes, strict=True)):
        expected = [slot for run in slot_runs(blocks, range(start, stop), size) for slot in run]
        assert [int(run[column]) + i for run in runs for i in range(int(run[2]))] == expected
    ends = runs[:-1, :2] + runs[:-1, 2:]
    assert not (ends == runs[1:, :2]).all(axis=1).any(), "two runs could be one"


def test_zeros_move_a_state_on() -> None:
    for size in (1, 4, 256):
        table = zeros_table(size)
        for text in (b"", b"a", b"baton"):
            state = crc32c(text) ^ 0xFFFFFFFF
            moved = 0
            for byte in range(4):
                moved ^= int(table[byte, state >> 8 * byte & 0xFF])
            assert moved ^ 0xFFFFFFFF == crc32c(text + bytes(size))
