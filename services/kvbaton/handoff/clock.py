"""Wall-clock time that never steps: what spans and durations are measured with."""

import time

_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def wall_ns() -> int:
    """Unix time in nanoseconds, as the wall clock stood at start and monotonic since."""
    return time.monotonic_ns() + _OFFSET_NS


def wall_seconds() -> float:
    """The same in seconds."""
    return wall_ns() / 1e9
