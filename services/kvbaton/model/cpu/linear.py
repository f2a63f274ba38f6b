"""Linear layers in bfloat16 whose weights were put, once at load, into the order in which they are read.

On one core with a bfloat16 unit by the project's own kernel, which was measured 1.3 to 1.7 times as fast as oneDNN's at
1 to 8 rows and alike at more (docs/adr/0011); elsewhere by oneDNN's.
"""

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from kvbaton.model.cpu import numeric, product_kernel
from kvbaton.model.cpu.allocator import LargePages

_PAGES = LargePages()

EXPECTED_ROWS = 8
"""Rows that oneDNN's layout is chosen for: a decode batch. Larger ones run as fast from it."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and this torch have kernels that read packed weights of `dtype`.

    Only bfloat16 gains: float32 products run as fast from the ordinary layout.
    """
    if dtype is not torch.bfloat16 or not torch._C._has_mkldnn:
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def is_packable(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a `PackedLinear` can take the module's place."""
    return type(module) is nn.Linear and can_pack(module.weight.dtype)


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for x [..., in_features], as `nn.Linear` has it; the weight cannot be read back."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` [out_features, in_features] is copied; `can_pack` must have allowed its dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # The kernel knows one core; oneDNN divides its work among threads.
        self._own = numeric.has_bfloat16_unit() and torch.get_num_threads() == 1 and self.in_features % 2 == 0
        if self._own:
            self._packed = _PAGES.copy(product_kernel.pack(weight.detach()))
            self._bias = np.empty(0, np.float32) if bias is None else bias.detach().float().numpy()
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), EXPECTED_ROWS)
            self._onednn_bias = None if bias is None else bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns [..., out_features]. Raises ValueError for rows of another width or dtype: the kernel cannot tell."""
        if rows.shape[-1] != self.in_features or rows.dtype is not torch.bfloat16:
            raise ValueError(f"rows of {self.in_features} bfloat16 are needed, not {tuple(rows.shape)} {rows.dtype}")
        if not self._own:
            product = torch.ops.mkldnn._linear_pointwise
            result: torch.Tensor = product(rows, self._packed, self._onednn_bias, "none", [], "")
            return result
        rows = rows.contiguous()
        result = rows.new_empty(*rows.shape[:-1], self.out_features)
        product_kernel.multiply(
            rows.data_ptr(),
            rows.numel() // self.in_features,
            self.in_features,
            self._packed.data_ptr(),
            self._bias,
            self.out_features,
            result.data_ptr(),
        )
        return result

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> "PackedLinear":
        """One layer that computes several of the same input, their outputs side by side."""
        biases = [linear.bias for linear in linears]
        weight = torch.cat([linear.weight for linear in linears])
        if all(bias is None for bias in biases):
            return cls(weight, None)
        pairs = zip(biases, linears, strict=True)
        return cls(
            weight, torch.cat([weight.new_zeros(linear.out_features) if b is None else b for b, linear in pairs])
        )


class SharedInput:
    """Computes several linear layers of one input in one product, although the model calls them one by one."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._packed = PackedLinear.of(linears)
        self._sizes = [linear.out_features for linear in linears]
        self._input: torch.Tensor | None = None
        self._outputs: Sequence[torch.Tensor] = ()
        self._left = 0

    def output(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """The `index`-th layer's output for `rows`; a view into that of all."""
        if self._input is not rows:
            self._input, self._left = rows, len(self._sizes)
            self._outputs = self._packed(rows).split(self._sizes, dim=-1)
        output = self._outputs[index]
        self._left -= 1
        if self._left == 0:
            # Another tensor may come to lie where this one was.
            self._input, self._outputs = None, ()
        return output


class SharedInputMember(nn.Module):
    """One of the layers of a `SharedInput`, in the place of the `nn.Linear` that it was made from."""

    def __init__(self, shared: SharedInput, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self._shared, self._index = shared, index
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns [..., out_features]."""
        return self._shared.output(self._index, rows)
