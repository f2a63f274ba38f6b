"""Copies of a rectangle of KV between two pieces of device memory, in as few kernels as its shape allows.

A rectangle has a part for K and one for V of each layer, and a part has a piece for each run of slots. Layers of one
shape lie at equal distances, so that one piece of each of them makes one strided copy, whatever their number: a
2,048-token prompt whose blocks follow one another is two kernels, or one, and its bytes are read and written once.
Everything here is in bytes, and nothing of it needs a device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_UNITS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@dataclass(frozen=True, slots=True)
class Part:
    """One layer's K, or its V, on both sides: rows of `width` bytes, one for each slot, from an offset on."""

    source: int
    target: int
    width: int


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Consecutive slots on both sides."""

    source: int
    target: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """`count` pieces of `length` bytes, each as far from the one before it as a stride says."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    count: int
    length: int


def paired(source: Iterable[range], target: Iterable[range]) -> list[SlotRun]:
    """Runs of slots of the same tokens in two pools, cut where either of them ends one."""
    result: list[SlotRun] = []
    sources, targets = list(source), list(target)
    assert sum(map(len, sources)) == sum(map(len, targets)), "different numbers of tokens"
    i = j = done_i = done_j = 0
    while i < len(sources):
        length = min(len(sources[i]) - done_i, len(targets[j]) - done_j)
        result.append(SlotRun(sources[i].start + done_i, targets[j].start + done_j, length))
        done_i, done_j = done_i + length, done_j + length
        if done_i == len(sources[i]):
            i, done_i = i + 1, 0
        if done_j == len(targets[j]):
            j, done_j = j + 1, 0
    return result


def plan(parts: Sequence[Part], runs: Sequence[SlotRun]) -> list[StridedCopy]:
    """The copies of all `runs` in all `parts`; `parts` are K and V in turn."""
    # K and V at equal distances are one progression; of different widths they are two, each by itself.
    groups = min(_progressions(parts), _progressions([*parts[::2], *parts[1::2]]), key=len)
    return [
        StridedCopy(
            source=first.source + run.source * first.width,
            source_stride=second.source - first.source,
            target=first.target + run.target * first.width,
            target_stride=second.target - first.target,
            count=count,
            length=run.num_slots * first.width,
        )
        for first, second, count in groups
        for run in runs
    ]


def execute(copies: Sequence[StridedCopy], source: torch.Tensor, target: torch.Tensor) -> None:
    """Queue the copies from `source` to `target`, [bytes] of uint8 each, on the current stream."""
    for copy in copies:
        size, dtype = _unit(copy)
        shape = copy.count, copy.length // size
        from_view = _cut(source, copy.source, copy.source_stride, copy).view(dtype)
        to_view = _cut(target, copy.target, copy.target_stride, copy).view(dtype)
        to_view.as_strided(shape, (copy.target_stride // size, 1)).copy_(
            from_view.as_strided(shape, (copy.source_stride // size, 1)), non_blocking=True
        )


def _progressions(parts: Sequence[Part]) -> list[tuple[Part, Part, int]]:
    """The longest runs of parts at equal, growing distances on both sides: the first two, and how many there are."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and _continues(groups[-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [(group[0], group[min(1, len(group) - 1)], len(group)) for group in groups]


def _continues(group: Sequence[Part], part: Part) -> bool:
    last = [*group[-2:], part]
    steps = [(after.source - before.source, after.target - before.target) for before, after in pairwise(last)]
    return part.width == group[-1].width and min(steps[-1]) > 0 and len(set(steps)) == 1


def _unit(copy: StridedCopy) -> tuple[int, torch.dtype]:
    """The widest integer that a copy is made of."""
    common = math.gcd(copy.source, copy.source_stride, copy.target, copy.target_stride, copy.length)
    return next((size, dtype) for size, dtype in _UNITS if common % size == 0)


def _cut(memory: torch.Tensor, start: int, stride: int, copy: StridedCopy) -> torch.Tensor:
    stop = start + stride * (copy.count - 1) + copy.length
    assert start >= 0, "bytes before the memory"
    assert stop <= len(memory), f"bytes [{start}, {stop}) of {len(memory)}"
    return memory[start:stop]
