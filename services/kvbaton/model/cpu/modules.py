"""Modules that take the place of a model's own on a CPU: the same function, in fewer passes over memory."""

from collections.abc import Sequence
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
        self.weights = weight.detach().float().numpy()
        self.epsilon = np.float32(epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., dim]. Raises ValueError for another dim, beyond which the kernel would read."""
        if hidden_states.shape[-1] != len(self.weights):
            raise ValueError(f"rows of {len(self.weights)} are normalised, not {tuple(hidden_states.shape)}")
        hidden_states = hidden_states.contiguous()
        output, dim = torch.empty_like(hidden_states), hidden_states.shape[-1]
        rms_norm(as_array(hidden_states.view(-1, dim)), self.weights, self.epsilon, as_array(output.view(-1, dim)))
        return output


class FusedGatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up in one product."""

    def __init__(self, linears: Sequence[nn.Linear], activation: Any) -> None:
        """`linears` are gate, up and down."""
        super().__init__()
        gate, up, down = linears
        self._gate_up = PackedLinear.of([gate, up])
        self._down = PackedLinear.of([down])
        probe = torch.linspace(-8, 8, 65)
        self._is_silu = torch.equal(activation(probe), nn.functional.silu(probe))
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        both = self._gate_up.forward(x)
        if self._is_silu:
            product = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
            silu_gate(as_array(both.flatten(0, -2)), as_array(product.flatten(0, -2)))
        else:
            gate, up = both.chunk(2, dim=-1)
            product = self._activation(gate) * up
        return self._down.forward(product)
