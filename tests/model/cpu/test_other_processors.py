"""Kernels compiled for a processor without AVX-512, let alone its bfloat16 unit, give the same."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_for_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a processor lacks shows in a process of its own alone: numba asks once, and machine code stays.
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_kernels.py", "test_decode_kernels.py", "test_linear.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=here.parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "skipped" in result.stdout, "the unit is still there"
