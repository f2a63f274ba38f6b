"""Where a pool's tensors lie within one piece of memory: what another process must know to read its blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry

_ALIGNMENT = 512
"""Bytes: what devices' allocators align to, and a multiple of a cache line."""


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Mirrors `PoolLayout` of kv_transfer.proto. One that a peer has told is believed after `layout_problem` alone."""

    num_bytes: int
    block_size: int
    num_blocks: int
    k_offsets: tuple[int, ...]
    """By layer: bytes before K, `[num_blocks, block_size, num_kv_heads, k_head_dim]`."""
    v_offsets: tuple[int, ...]
    probe_offset: int
    probe_bytes: int
    """Bytes from `probe_offset` on are no block's."""


def row_bytes(geometry: KvGeometry) -> list[tuple[int, int]]:
    """By layer: bytes of one token's K, and of its V."""
    size = DTYPE_BYTES[geometry.dtype]
    return [
        (layer.num_kv_heads * layer.k_head_dim * size, layer.num_kv_heads * layer.v_head_dim * size)
        for layer in geometry.layers
    ]


def lay_out(geometry: KvGeometry, num_blocks: int, block_size: int, probe_bytes: int = 0) -> PoolLayout:
    """A layout of our own: the probe area, then K and V of each layer in turn, all of them aligned."""
    position = _aligned(probe_bytes)
    k_offsets: list[int] = []
    v_offsets: list[int] = []
    for widths in row_bytes(geometry):
        for offsets, width in zip((k_offsets, v_offsets), widths, strict=True):
            offsets.append(position)
            position += _aligned(num_blocks * block_size * width)
    return PoolLayout(
        num_bytes=position,
        block_size=block_size,
        num_blocks=num_blocks,
        k_offsets=tuple(k_offsets),
        v_offsets=tuple(v_offsets),
        probe_offset=0,
        probe_bytes=probe_bytes,
    )


def layout_problem(layout: PoolLayout, geometry: KvGeometry) -> str | None:
    """Why a layout cannot be that of a pool of `geometry`; None when all it names lies within its memory."""
    if layout.block_size < 1 or layout.num_blocks < 1:
        return f"layout: {layout.num_blocks} blocks of {layout.block_size} tokens"
    for name, offsets in (("k_offsets", layout.k_offsets), ("v_offsets", layout.v_offsets)):
        if len(offsets) != geometry.num_layers:
            return f"layout.{name}: {len(offsets)} of a model with {geometry.num_layers} layers"
    for name, start, size in _areas(layout, geometry):
        if start < 0 or size < 0 or start + size > layout.num_bytes:
            return f"layout.{name}: bytes [{start}, {start + size}) of {layout.num_bytes}"
    return None


def _areas(layout: PoolLayout, geometry: KvGeometry) -> Iterator[tuple[str, int, int]]:
    num_slots = layout.num_blocks * layout.block_size
    yield "probe_offset", layout.probe_offset, layout.probe_bytes
    for layer, (k_bytes, v_bytes) in enumerate(row_bytes(geometry)):
        yield f"k_offsets[{layer}]", layout.k_offsets[layer], num_slots * k_bytes
        yield f"v_offsets[{layer}]", layout.v_offsets[layer], num_slots * v_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
