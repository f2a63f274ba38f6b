"""Rectangles of KV as strided copies: every byte gets where it belongs, nothing else is touched, and copies are few."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.model.cuda.strides import Part, SlotRun, StridedCopy, execute, paired, plan


def test_runs_of_two_pools_are_cut_where_either_ends() -> None:
    assert paired([range(8, 11), range(4)], [range(20, 25), range(2, 4)]) == [
        SlotRun(8, 20, 3),
        SlotRun(0, 23, 2),
        SlotRun(2, 2, 2),
    ]
    assert paired([], []) == []


def test_runs_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="different numbers"):
        paired([range(3)], [range(4)])


def test_layers_of_one_shape_are_one_copy_a_run() -> None:
    parts = [Part(source=1000 * n, target=512 + 640 * n, width=16) for n in range(56)]
    copies = plan(parts, [SlotRun(0, 4, 10), SlotRun(20, 14, 2)])
    assert copies == [
        StridedCopy(source=0, source_stride=1000, target=512 + 64, target_stride=640, count=56, length=160),
        StridedCopy(source=320, source_stride=1000, target=512 + 224, target_stride=640, count=56, length=32),
    ]


def test_keys_and_values_of_different_widths_are_a_copy_each() -> None:
    layers = range(28)
    parts = [part for n in layers for part in (Part(3000 * n, 100 * n, 16), Part(3000 * n + 2000, 100 * n + 64, 8))]
    assert [(copy.count, copy.length) for copy in plan(parts, [SlotRun(0, 0, 4)])] == [(28, 64), (28, 32)]


@settings(deadline=None)
@given(data=st.data())
def test_every_byte_arrives_and_no_other_changes(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.sampled_from([2, 4, 6, 8, 16]), min_size=1, max_size=5).map(lambda w: [*w, *w]))
    slots = st.permutations(range(12)).map(lambda all_slots: [range(n, n + 1) for n in all_slots[:7]])
    source_slots, target_slots = data.draw(slots), data.draw(slots)
    aligned = data.draw(st.sampled_from([8, 16, 64]))

    def offsets() -> list[int]:
        position, result = data.draw(st.integers(0, 3)) * aligned, []
        for width in widths:
            result.append(position)
            position += -(-12 * width // aligned) * aligned
        return result

    parts = [Part(*three) for three in zip(offsets(), offsets(), widths, strict=True)]
    size = 8 * 64 + sum(12 * width + 64 for width in widths) // 64 * 64
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    target = torch.randint(0, 256, (size,), dtype=torch.uint8)
    expected = target.clone()
    for part in parts:
        for theirs, ours in zip(source_slots, target_slots, strict=True):
            start, at = part.source + theirs.start * part.width, part.target + ours.start * part.width
            expected[at : at + part.width] = source[start : start + part.width]
    execute(plan(parts, paired(source_slots, target_slots)), source, target)
    assert target.equal(expected)


def test_a_copy_beyond_the_memory_is_a_mistake_and_copies_nothing() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"bytes \[0, 72\) of 64"):
        execute(plan([Part(0, 0, 8), Part(32, 32, 8)], [SlotRun(0, 0, 5)]), memory, memory.clone())
