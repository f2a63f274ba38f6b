"""torch's attention of ragged queries over paged KV, `varlen_attn`, and how it must be called to be right.

What is known of it, from torch's own sources (torch/nn/attention/varlen.py; aten's flash_attn/flash_api.cpp,
`mha_varlen_fwd`): it is FlashAttention 2 unless another one is activated. That takes float16 and bfloat16, heads whose
width is a multiple of 8 up to 256 and the same for K and V, and pages of a multiple of 256 tokens. Causality and
windows are aligned to the last key. It has neither a soft cap nor sinks.

It may split a sequence's keys among processors. Only for one query a sequence, several query heads a KV head and no
window are the parts joined correctly (pytorch issue 194167: rows of later sequences are not written); everything else
must ask for one part. Some versions take no such wish, and never split.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvbaton.model.attention import LayerShape, Tensors
from kvbaton.model.ragged import Varlen

_NEEDED = frozenset({"scale", "window_size", "enable_gqa", "seqused_k", "block_table"})
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_DIM, _DIM_MULTIPLE, PAGE_MULTIPLE = 256, 8, 256

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Splits:
    """Arguments that say among how many processors a sequence's keys are split."""

    decodes: dict[str, int]
    """Where parts are joined correctly."""
    others: dict[str, int]


_ONE = {"num_splits": 1}


class VarlenKernel:
    """`varlen_attn`, or a function like it, over a layer's blocks."""

    def __init__(self, function: Function) -> None:
        """`function` has the signature of `torch.nn.attention.varlen.varlen_attn`."""
        self._function = function

    def refusal(self, tensors: Tensors, shape: LayerShape, block_size: int) -> str | None:
        """Why the kernel cannot compute a layer's attention; None when it should."""
        query, key, value = tensors
        dim = query.shape[-1]
        checks = {
            "it caps its scores": shape.softcap is not None,
            "it has attention sinks": shape.sinks is not None,
            f"its keys are {dim} wide and its values {value.shape[-1]}": dim != value.shape[-1],
            f"its heads are {dim} wide": dim % _DIM_MULTIPLE != 0 or dim > _MAX_DIM,
            f"its {query.shape[1]} heads do not divide among {key.shape[1]}": query.shape[1] % key.shape[1] != 0,
            f"its dtype is {query.dtype}": query.dtype not in _DTYPES,
            f"its blocks of {block_size} tokens are no multiple of {PAGE_MULTIPLE}": block_size % PAGE_MULTIPLE != 0,
        }
        return next((reason for reason, applies in checks.items() if applies), None)

    def splits(self) -> Iterator[Splits]:
        """Ways to call the kernel, the fastest first. Which are right depends on torch's version: try them."""
        if "num_splits" in inspect.signature(self._function).parameters:
            yield Splits(decodes={}, others=_ONE)
            yield Splits(decodes=_ONE, others=_ONE)
        yield Splits(decodes={}, others={})

    def attend(
        self,
        query: torch.Tensor,
        blocks: tuple[torch.Tensor, torch.Tensor],
        shape: LayerShape,
        varlen: Varlen,
        splits: Splits,
    ) -> torch.Tensor:
        """`query` [tokens, heads, dim] over K and V `blocks` [blocks, block_size, kv_heads, dim]; shape of `query`."""
        keys, values = blocks
        grouped = query.shape[1] != keys.shape[2]
        one_query = varlen.max_query == 1 and shape.window is None
        options: dict[str, Any] = {"scale": shape.scaling, "enable_gqa": grouped}
        options |= splits.decodes if one_query and grouped else splits.others
        if one_query:
            # The last token sees everything. Said as "causal" it would not be split: a window to the right is one, too.
            options["window_size"] = (-1, -1)
        else:
            options["window_size"] = (-1 if shape.window is None else shape.window - 1, 0)
        output: torch.Tensor = self._function(
            query,
            keys,
            values,
            varlen.query_starts,
            varlen.key_starts,
            varlen.max_query,
            varlen.max_length,
            seqused_k=varlen.lengths,
            block_table=varlen.tables,
            **options,
        )
        return output


def find_kernel() -> VarlenKernel | None:
    """torch's kernel, by what it takes and not by torch's version; None where torch has none for paged KV."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return VarlenKernel(varlen_attn) if inspect.signature(varlen_attn).parameters.keys() >= _NEEDED else None
