"""`--threads` bounds the threads of computation, whichever library starts them and on whichever thread it is called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import tiny_models

# Numbers of threads beyond Python's own: with everything loaded, and while and after a thread of its own has computed.
SCRIPT = """
import sys, threading
from pathlib import Path
from kvbaton.cli.serve import limit_threads
if sys.argv[2] != "unlimited":
    limit_threads(int(sys.argv[2]))
import numpy, tokenizers, torch
from kvbaton.model.loader import load_model

def others():
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()

def compute():
    # The first is a plain matrix product: torch has not had the chance to set anything for this thread.
    rows, weights = torch.ones(256, 512), torch.ones(512, 512)
    rows @ weights
    counts.append(others())
    torch.nn.functional.linear(rows.bfloat16(), weights.bfloat16())
    (rows * 2).softmax(-1).sort(-1)
    tokenizers.Tokenizer(tokenizers.models.BPE()).encode_batch(["text"] * 100)
    load_model(sys.argv[1], "bfloat16", "cpu")
    counts.append(others())

counts = [others()]
thread = threading.Thread(target=compute)
thread.start()
thread.join()
print(max(counts))
"""


def other_threads(folder: Path, threads: str) -> int:
    # As a user's process starts, not as the test run's settings have it.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_THREADS")}  # noqa: TID251
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), threads],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_no_more_threads_than_asked_for(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model("llama", tmp_path)
    assert other_threads(folder, "1") == 0
    if len(os.sched_getaffinity(0)) > 1:
        # On one core nothing would start threads in any case.
        assert other_threads(folder, "unlimited") > 0
