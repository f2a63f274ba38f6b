"""Copies of runs of bytes with their CRC32C, in one pass over memory: what is checked is what was written.

Addresses are int64 everywhere: numba makes a float of int64 and uint64 together.
"""

from typing import Any

import numpy as np

from kvbaton.model.cpu.crc32c_kernel import (
    NOTHING,
    STREAM,
    add_byte,
    add_word,
    copy_lines,
    fence,
    move_byte,
    move_word,
    stream_lines,
    sum_lines,
    zeros_table,
)
from kvbaton.model.cpu.numeric import kernel

_ALL = 0xFFFFFFFF
_LINE = 64
_LONG, _SHORT = 4096, 256
"""Bytes of one of three pieces that are summed side by side: putting them together costs some thirty cycles."""
_LONG_ZEROS, _SHORT_ZEROS = zeros_table(_LONG), zeros_table(_SHORT)


@kernel
def copy_runs(planes: Any, runs: Any, mode: int) -> Any:
    """CRC32C of all runs of all planes, one after the other, and what `mode` says done with them.

    `planes` [p, 3], int64: address of the source, address of the target, bytes of a slot. `runs` [r, 3], int64: first
    slot in the source, first in the target, number of slots.
    """
    state = np.int64(_ALL)
    last_plane, last_run = planes.shape[0] - 1, runs.shape[0] - 1
    for p in range(planes.shape[0]):
        source, target, width = planes[p, 0], planes[p, 1], planes[p, 2]
        for r in range(runs.shape[0]):
            after = source + runs[min(r + 1, last_run), 0] * width
            if r == last_run:
                following = min(p + 1, last_plane)
                after = planes[following, 0] + runs[0, 0] * planes[following, 2]
            state = _run(
                target + runs[r, 1] * width,
                source + runs[r, 0] * width,
                runs[r, 2] * width,
                after,
                state,
                np.int64(mode),
            )
    if mode == STREAM:
        fence()
    return state ^ np.int64(_ALL)


@kernel
def within(numbers: Any, stop: int) -> bool:
    """Whether all of `numbers` [n], int64, are 0 or more, and below `stop`."""
    inside = True
    for number in numbers:
        inside &= 0 <= number < stop
    return inside


@kernel
def pair_runs(theirs: Any, their_size: Any, ours: Any, our_size: Any, start: int, stop: Any) -> Any:
    """Where tokens [start, stop) lie in two pools, as the fewest runs: [r, 3], int64, see `copy_runs`.

    `theirs` and `ours`, int64, are block lists of which the first holds `start`; blocks have as many tokens as the
    sizes say.
    """
    runs = np.empty((theirs.shape[0] + ours.shape[0], 3), np.int64)
    count, token = 0, start
    their_first, our_first = start // their_size, start // our_size
    while token < stop:
        there, here = token % their_size, token % our_size
        length = min(their_size - there, our_size - here, stop - token)
        source = theirs[token // their_size - their_first] * their_size + there
        target = ours[token // our_size - our_first] * our_size + here
        last = max(count - 1, 0)
        if count > 0 and runs[last, 0] + runs[last, 2] == source and runs[last, 1] + runs[last, 2] == target:
            runs[last, 2] += length
        else:
            runs[count, 0], runs[count, 1], runs[count, 2] = source, target, length
            count += 1
        token += length
    return runs[:count]


@kernel
def _run(target: Any, source: Any, size: Any, after: Any, state: Any, mode: Any) -> Any:
    """One run; the next will begin at `after`."""
    stop = source + size
    if mode == STREAM:
        # Lines that go past the caches are whole ones.
        head = min(-target % _LINE, size)
        state = _words(target, source, source + head, state, mode)
        target, source = target + head, source + head
    # How far ahead is fetched: no further than the next run, if that is as long as this one.
    reach = min(stop - source, 3 * _LONG)
    state = _thirds(target, source, stop, np.int64(_LONG), _LONG_ZEROS, reach, after - stop, state, mode)
    done = (stop - source) // (3 * _LONG) * (3 * _LONG)
    target, source = target + done, source + done
    state = _thirds(target, source, stop, np.int64(_SHORT), _SHORT_ZEROS, reach, after - stop, state, mode)
    done = (stop - source) // (3 * _SHORT) * (3 * _SHORT)
    return _words(target + done, source + done, stop, state, mode)


@kernel
def _thirds(
    target: Any, source: Any, stop: Any, lane: Any, zeros: Any, reach: Any, jump: Any, state: Any, mode: Any
) -> Any:
    """As much of [source, stop) as three pieces of `lane` bytes each fit into, again and again."""
    while stop - source >= 3 * lane:
        second = third = np.int64(0)
        for at in range(0, lane, _LINE):
            to, place = target + at, source + at
            if mode == NOTHING:
                state, second, third = sum_lines(to, place, lane, reach, stop, jump, state, second, third)
            elif mode == STREAM:
                state, second, third = stream_lines(to, place, lane, reach, stop, jump, state, second, third)
            else:
                state, second, third = copy_lines(to, place, lane, reach, stop, jump, state, second, third)
        state = _followed(_followed(state, zeros) ^ second, zeros) ^ third
        target, source = target + 3 * lane, source + 3 * lane
    return state


@kernel
def _followed(state: Any, zeros: Any) -> Any:
    low = zeros[0, state & 0xFF] ^ zeros[1, state >> 8 & 0xFF]
    return low ^ zeros[2, state >> 16 & 0xFF] ^ zeros[3, state >> 24 & 0xFF]


@kernel
def _words(target: Any, source: Any, stop: Any, state: Any, mode: Any) -> Any:
    while stop - source >= 8:
        state = add_word(state, source)
        if mode != NOTHING:
            move_word(target, source)
        target, source = target + 8, source + 8
    while source < stop:
        state = add_byte(state, source)
        if mode != NOTHING:
            move_byte(target, source)
        target, source = target + 1, source + 1
    return state
