"""A linear layer's product in bfloat16 on one core: the project's kernel, oneDNN's packed weights, and `F.linear`.

    taskset -c 1 python bench/products.py

Shapes are those of the 0.6b and 30m models of `random_models`. Weights are taken in turns from copies that no cache
holds together, as a step's layers are. Every kernel takes its turn in each round, so that a busy machine is equally
busy for all, and its best round counts.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from kvbaton.model.cpu.linear import EXPECTED_ROWS, PackedLinear, can_pack
from kvbaton.model.cpu.numeric import has_bfloat16_unit

SHAPES = [(4096, 1024), (1024, 3072), (32000, 1024), (1024, 512)]
"""Outputs and inputs."""
ROWS = (1, 4, 8, 64, 512)
ROUNDS = 7
_WORKING_SET = 128 << 20
"""Bytes of all copies of a weight."""

Product = Callable[[torch.Tensor], object]


def own(weight: torch.Tensor) -> Product:
    """The project's kernel, as it is served where there is a unit."""
    layer = PackedLinear(weight, None)
    return layer.forward


def onednn(weight: torch.Tensor) -> Product:
    """oneDNN's packed layout, as it is served where there is no unit."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)
    return lambda rows: torch.ops.mkldnn._linear_pointwise.default(rows, packed, None, "none", [], "")


def plain(weight: torch.Tensor) -> Product:
    """torch's own layout."""
    return lambda rows: functional.linear(rows, weight)


def measure(kernels: dict[str, list[Product]], rows: torch.Tensor) -> dict[str, float]:
    """Seconds of one product, best of the rounds, each of which takes every copy once."""
    best = dict.fromkeys(kernels, float("inf"))
    for number in range(ROUNDS + 1):
        for name, copies in kernels.items():
            begin = time.perf_counter()
            for product in copies:
                product(rows)
            if number:
                best[name] = min(best[name], (time.perf_counter() - begin) / len(copies))
    return best


@torch.inference_mode()
def main() -> None:
    """Print a table in Markdown: GB of weights a second, and TFLOPS where there are many rows."""
    torch.set_num_threads(1)
    available: dict[str, Callable[[torch.Tensor], Product]] = {}
    if has_bfloat16_unit():
        available["own"] = own
    if can_pack(torch.bfloat16):
        available["oneDNN packed"] = onednn
    available["F.linear"] = plain
    sys.stdout.write("| outputs x inputs | rows | " + " | ".join(available) + " |\n")
    sys.stdout.write("|---" * (2 + len(available)) + "|\n")
    for outputs, inputs in SHAPES:
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(0, 0.02)
        num_copies = max(1, _WORKING_SET // weight.nbytes)
        kernels = {name: [ready(weight.clone()) for _ in range(num_copies)] for name, ready in available.items()}
        for num in ROWS:
            seconds = measure(kernels, torch.randn(num, inputs, dtype=torch.bfloat16))
            cells = [_cell(value, weight, num) for value in seconds.values()]
            sys.stdout.write(f"| {outputs} x {inputs} | {num} | " + " | ".join(cells) + " |\n")
            sys.stdout.flush()


def _cell(seconds: float, weight: torch.Tensor, rows: int) -> str:
    if rows < ROWS[-2]:
        return f"{weight.nbytes / seconds / 1e9:.1f} GB/s"
    return f"{2 * rows * weight.numel() / seconds / 1e12:.2f} TFLOPS"


if __name__ == "__main__":
    main()
