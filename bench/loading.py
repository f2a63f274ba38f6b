"""What loading a model costs: seconds, and memory of its own (anonymous) and of mapped files, which workers share.

python bench/random_models.py 0.6b build/models/0.6b && python bench/loading.py build/models/0.6b --dtype bfloat16
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from kvbaton.model.loader import load_model

FIELDS = ("RssAnon", "RssFile", "VmHWM")


def memory() -> dict[str, float]:
    """MiB of this process, by the kernel's names; VmHWM is the most that was resident at once."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0].rstrip(":") in FIELDS}


def main() -> None:
    """Load the model that the command line names, and print what that took."""
    parser = argparse.ArgumentParser(description="Measure the loading of a model.")
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before, begin = memory(), time.monotonic()
    loaded = load_model(arguments.folder, arguments.dtype, arguments.device)
    seconds, after = time.monotonic() - begin, memory()
    grown = ", ".join(f"{name} +{after[name] - before[name]:,.0f} MiB" for name in FIELDS)
    weights = f"weights {loaded.weights_bytes / 2**20:,.0f} MiB in {loaded.geometry.dtype}"
    sys.stdout.write(f"{weights}, loaded in {seconds:.1f} s: {grown}\n")


if __name__ == "__main__":
    main()
