"""How the C library hands memory to torch, which asks for megabytes at every step."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD = 1 << 30
_OLD_THRESHOLD = 32 << 20
"""The most that glibc took before 2.35; it refuses more, and would stay at 128 KiB."""


def keep_freed_memory() -> None:
    """Let freed memory be used again instead of returning it to the kernel at once. Harmless where there is no glibc.

    By default glibc maps each large block anew, and the kernel zeroes its pages one fault at a time: at 512 tokens of a
    model 1024 wide that makes an elementwise operation four to eight times as slow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD) or mallopt(_M_MMAP_THRESHOLD, _OLD_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
