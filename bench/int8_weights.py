"""Whether int8 weights are faster on a CPU than bfloat16 ones in oneDNN's packed layout: all linear layers of one step.

    pip install torchao==0.18.0 && taskset -c 1 python bench/int8_weights.py

The layers are those of the 0.6b model of `random_models`, QKV and gate/up fused. Every kernel takes its turn in each
round, so that a busy machine is equally busy for all, and its best round counts.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from random_models import SHAPES

ROWS = (1, 8, 512)
ROUNDS = 5

Step = Callable[[dict[int, torch.Tensor]], object]
"""Runs every layer on the input of its width."""


def weights() -> list[torch.Tensor]:
    """[out, in] of each linear layer, in the order in which a step uses them."""
    config = SHAPES["0.6b"]
    hidden, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = [
        (query + 2 * key, hidden),
        (hidden, query),
        (2 * config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
    ]
    shapes = [*layer * config.num_hidden_layers, (config.vocab_size, hidden)]
    return [torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for shape in shapes]


class Layers(nn.Module):
    """All of them as one module, to be quantised and compiled."""

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self._widths = [matrix.shape[1] for matrix in matrices]
        for matrix in matrices:
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            self.layers.append(layer)

    def forward(self, inputs: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of all layers."""
        return [layer(inputs[width]) for layer, width in zip(self.layers, self._widths, strict=True)]


def packed(matrices: Sequence[torch.Tensor]) -> Step:
    """bfloat16 in oneDNN's layout."""
    linear = torch.ops.mkldnn._linear_pointwise.default
    ready = [(m.shape[1], torch.ops.mkldnn._reorder_linear_weight(m, 8)) for m in matrices]
    return lambda inputs: [linear(inputs[width], weight, None, "none", [], "") for width, weight in ready]


def int8_kernel(matrices: Sequence[torch.Tensor]) -> Step:
    """torch's own int8 weight-only kernel, one scale a row."""
    scales = [matrix.float().abs().amax(1) / 127 for matrix in matrices]
    ready = [
        (m.shape[1], (m.float() / scale[:, None]).round().to(torch.int8), scale.bfloat16())
        for m, scale in zip(matrices, scales, strict=True)
    ]
    return lambda inputs: [torch._weight_int8pack_mm(inputs[width], weight, scale) for width, weight, scale in ready]


def torchao(matrices: Sequence[torch.Tensor]) -> Layers:
    """torchao's int8 weight-only layers."""
    layers = Layers(matrices).eval()
    quantize_(layers, Int8WeightOnlyConfig())
    return layers


@torch.inference_mode()
def measure(steps: dict[str, Step], widths: Sequence[int], rows: int) -> dict[str, float]:
    """Milliseconds of each step's best round."""
    inputs = {width: torch.randn(rows, width, dtype=torch.bfloat16) for width in widths}
    best = dict.fromkeys(steps, float("inf"))
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(inputs)
            if number:
                best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
    return best


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._inductor.config.freezing = True
    matrices = weights()
    steps: dict[str, Step] = {
        "bfloat16, oneDNN packed": packed(matrices),
        "int8, `torch._weight_int8pack_mm`": int8_kernel(matrices),
        "int8, torchao, eager": torchao(matrices),
        "int8, torchao, `torch.compile`": torch.compile(torchao(matrices), dynamic=False),
    }
    widths = sorted({matrix.shape[1] for matrix in matrices})
    columns = [measure(steps, widths, rows) for rows in ROWS]
    sys.stdout.write("| ms, all linear layers | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |\n|---|")
    sys.stdout.write("---|" * len(ROWS) + "\n")
    for name in steps:
        sys.stdout.write(f"| {name} | " + " | ".join(f"{column[name]:,.0f}" for column in columns) + " |\n")


if __name__ == "__main__":
    main()
