"""A loaded model has all the machine code that its requests will run."""

import subprocess
import sys
from pathlib import Path

import pytest

from support import tiny_models


@pytest.mark.parametrize(("architecture", "head_dim"), [("qwen3", 32), ("gpt_oss", 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_compile_nothing(architecture: str, head_dim: int, dtype: str, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model(architecture, tmp_path, head_dim=head_dim)
    # In a process of its own, where no other test has compiled anything.
    command = [sys.executable, "-m", "support.kernels", str(folder), dtype]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    at_load, afterwards = result.stdout.split()
    assert int(at_load) > 3
    assert at_load == afterwards
