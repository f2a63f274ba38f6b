"""What torch's documentation says of `varlen_attn` over paged KV, by scaled_dot_product_attention and on a CPU.

It insists on everything that the kernel insists on, or would silently compute something else without.
"""

import torch
from torch.nn import functional

from kvbaton.model.attention import LayerShape, Tensors
from kvbaton.model.cuda.kernel import VarlenKernel


def varlen_attn(  # noqa: PLR0913 - the real one's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Windows are aligned to the last key. Parts are lost where torch's issue 194167 says so."""
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seq_k is not None
    for numbers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert numbers.dtype is torch.int32
        assert numbers.is_contiguous()
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_k.diff().equal(seqused_k)
    starts, lengths = cu_seq_q.tolist(), seqused_k.tolist()
    assert (starts[0], starts[-1]) == (0, len(query))
    assert len(block_table) == len(lengths) == len(starts) - 1
    assert max_q == max(b - a for a, b in zip(starts, starts[1:], strict=False))
    assert max_k >= max(lengths)
    assert enable_gqa == (query.shape[1] != key.shape[2])
    output = query.new_full((*query.shape[:2], value.shape[-1]), float("nan"))
    joined = num_splits == 1 or (max_q == 1 and enable_gqa and window_size == (-1, -1))
    for number, (table, length) in enumerate(zip(block_table.long(), lengths, strict=True)):
        if number and not joined:
            break
        rows = slice(starts[number], starts[number + 1])
        keys, values = (blocks[table].flatten(0, 1)[:length].transpose(0, 1) for blocks in (key, value))
        at = torch.arange(length)
        last = at[-(rows.stop - rows.start) :, None]
        left, right = window_size
        mask = ((at >= last - left) | (left < 0)) & ((at <= last + right) | (right < 0))
        result = functional.scaled_dot_product_attention(
            query[rows].transpose(0, 1), keys, values, mask, scale=scale, enable_gqa=enable_gqa
        )
        output[rows] = result.transpose(0, 1)
    return output


class LenientKernel(VarlenKernel):
    """Takes any dtype, width and block size, as no kernel for a GPU does: tests are small."""

    def refusal(self, tensors: Tensors, shape: LayerShape, block_size: int) -> str | None:
        """See `VarlenKernel.refusal`."""
        return "it caps its scores or has sinks" if shape.softcap or shape.sinks is not None else None
