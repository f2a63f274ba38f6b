"""Modules that take the place of a model's own on a CPU: the same function, in fewer passes over memory."""

from typing import Any

import numpy as np
import torch
from torch import nn

from kvbaton.model.cpu.kernels import rms_norm, silu_gate
from kvbaton.model.cpu.linear import PackedLinear
from kvbaton.model.cpu.numeric import as_array


class CompiledRmsNorm(nn.Module):
    """RMS normalisation over the last dimension (Zhang and Sennrich 2019), rounded once, at its end."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        """`weight` [dim] is the factor itself: models that store it less one add that first."""
        super().__init__()
        self._weight = weight.detach().float().numpy()
        self._epsilon = np.float32(epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., dim]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = torch.empty_like(rows)
        rms_norm(as_array(rows), self._weight, self._epsilon, as_array(output))
        return output.view(hidden_states.shape)


class FusedGatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up in one product."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: Any) -> None:
        super().__init__()
        self._gate_up = PackedLinear.of([gate, up])
        self._down = PackedLinear.of([down])
        self._is_silu = isinstance(activation, nn.SiLU) or getattr(activation, "__name__", "") == "silu"
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        both = self._gate_up(x)
        if self._is_silu:
            product = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
            silu_gate(as_array(both.flatten(0, -2)), as_array(product.flatten(0, -2)))
        else:
            gate, up = both.chunk(2, dim=-1)
            product = self._activation(gate) * up
        result: torch.Tensor = self._down(product)
        return result
