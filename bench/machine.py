"""What the machine can do at the most, measured, and what it is: the header of every benchmark's result."""

import datetime
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

_MEBIBYTE = 1 << 20


def describe(**more: Any) -> dict[str, Any]:
    """Processor, software and date; `more` is added."""
    names = ("torch", "transformers", "numpy", "numba")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: metadata.version(name) for name in names},
        **more,
    }


def read_rate() -> float:
    """Bytes a second that one core reads from memory, best of several runs over more than any cache holds."""
    data = np.ones(256 * _MEBIBYTE // 8, dtype=np.uint64)
    _xor(data[:8])
    return data.nbytes / _best(lambda: _xor(data))


def copy_rate() -> float:
    """Bytes a second that one core copies within memory; each is read and written."""
    source = torch.ones(256 * _MEBIBYTE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return source.nbytes / _best(lambda: target.copy_(source))


def gemm_rate(rows: int = 512, inner: int = 1024, columns: int = 4096) -> float:
    """Floating-point operations a second of a bfloat16 product of the size of a large layer, on one core."""
    left = torch.randn(rows, inner, dtype=torch.bfloat16)
    right = torch.randn(columns, inner, dtype=torch.bfloat16)
    return 2 * rows * inner * columns / _best(lambda: torch.nn.functional.linear(left, right))


@numba.njit
def _xor(data: Any) -> Any:
    result = np.uint64(0)
    for i in range(data.shape[0]):
        result ^= data[i]
    return result


def _best(run: Any, repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
