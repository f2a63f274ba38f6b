"""The protobuf faces of values that both ends of a transfer compare."""

from kvbaton.engine.geometry import AS_IT_IS, ENCODING_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.pool_layout import PoolLayout
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.v1 import types_pb2 as types


def geometry_to_proto(geometry: KvGeometry) -> types.KvGeometry:
    """Layer groups in model order."""
    return types.KvGeometry(
        dtype=geometry.dtype,
        layer_groups=[
            types.LayerGroup(
                num_layers=count,
                num_kv_heads=layer.num_kv_heads,
                k_head_dim=layer.k_head_dim,
                v_head_dim=layer.v_head_dim,
                window=layer.window or 0,
            )
            for count, layer in geometry.groups()
        ],
    )


def fingerprint_problem(
    ours: types.ModelFingerprint, theirs: types.ModelFingerprint, encoding: str = AS_IT_IS
) -> str | None:
    """The first field in which two models differ, with both values; None when they are the same.

    Where KV travels in an `encoding`, the two may hold it in different dtypes, and then weights as well.
    """
    fields = ["architecture", "weights_digest", "kv_dtype"]
    if encoding and ours.kv_dtype != theirs.kv_dtype:
        fields = ["architecture", "rounded_digest"]
    for field in fields:
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            return f"fingerprint.{field}: sender has {_shown(other)}, receiver {mine!r}"
    return None


def encoding_problem(encoding: str) -> str | None:
    """What speaks against the encoding that a sender declares; None when it is known."""
    if encoding in (AS_IT_IS, *ENCODING_BYTES):
        return None
    return f"encoding: sender has {_shown(encoding)}, receiver {sorted(ENCODING_BYTES)}"


def geometry_problem(ours: KvGeometry, theirs: types.KvGeometry, encoding: str = AS_IT_IS) -> str | None:
    """Where a sender's geometry differs from ours; None when it is the same, but for the dtype of encoded KV."""
    if theirs.dtype != ours.dtype and not encoding:
        return f"geometry.dtype: sender has {_shown(theirs.dtype)}, receiver {ours.dtype!r}"
    num_groups = len(ours.groups())
    if len(theirs.layer_groups) != num_groups:
        return f"geometry.layer_groups: sender has {len(theirs.layer_groups)} groups, receiver {num_groups}"
    groups = [
        (
            group.num_layers,
            LayerGeometry(group.num_kv_heads, group.k_head_dim, group.v_head_dim, group.window or None),
        )
        for group in theirs.layer_groups
    ]
    if groups != ours.groups():
        return f"geometry.layer_groups: sender has {groups}, receiver {ours.groups()}"
    return None


def layout_to_proto(layout: PoolLayout) -> pb.PoolLayout:
    """How our pool lies in memory."""
    return pb.PoolLayout(
        num_bytes=layout.num_bytes,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        k_offsets=layout.k_offsets,
        v_offsets=layout.v_offsets,
        probe_offset=layout.probe_offset,
        probe_bytes=layout.probe_bytes,
    )


def layout_from_proto(layout: pb.PoolLayout) -> PoolLayout:
    """What a peer says of its pool: to be believed after `layout_problem` alone."""
    return PoolLayout(
        num_bytes=layout.num_bytes,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        k_offsets=tuple(layout.k_offsets),
        v_offsets=tuple(layout.v_offsets),
        probe_offset=layout.probe_offset,
        probe_bytes=layout.probe_bytes,
    )


def _shown(value: str) -> str:
    # A peer's text goes into a log line; its length must not be the peer's to choose.
    return repr(value[:100])
