"""A layout says where every token's KV lies, apart from all others; one that names anything outside is found out."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.pool_layout import PoolLayout, lay_out, layout_problem, row_bytes

LAYERS = st.lists(st.builds(LayerGeometry, *[st.integers(1, 300)] * 3), min_size=1, max_size=5).map(tuple)
GEOMETRIES = st.builds(KvGeometry, LAYERS, st.sampled_from(sorted(DTYPE_BYTES)))
LAYOUTS = st.tuples(GEOMETRIES, st.integers(1, 1 << 20), st.integers(1, 4096), st.integers(0, 1 << 23))


def areas(layout: PoolLayout, geometry: KvGeometry) -> list[tuple[int, int]]:
    """Every piece of memory that a layout names, as (start, stop)."""
    slots = layout.num_blocks * layout.block_size
    found = [(layout.probe_offset, layout.probe_offset + layout.probe_bytes)]
    for (k_bytes, v_bytes), k, v in zip(row_bytes(geometry), layout.k_offsets, layout.v_offsets, strict=True):
        found += [(k, k + slots * k_bytes), (v, v + slots * v_bytes)]
    return found


@given(LAYOUTS)
def test_areas_lie_apart(drawn: tuple[KvGeometry, int, int, int]) -> None:
    geometry, num_blocks, block_size, probe_bytes = drawn
    layout = lay_out(geometry, num_blocks, block_size, probe_bytes)
    assert layout_problem(layout, geometry) is None
    found = sorted(areas(layout, geometry))
    assert all(stop <= start for (_, stop), (start, _) in zip(found, found[1:], strict=False))
    assert found[-1][1] <= layout.num_bytes
    assert all(start % 64 == 0 for start, _ in found)
    assert sum(stop - start for start, stop in found[1:]) <= num_blocks * block_size * geometry.token_bytes


@given(LAYOUTS, st.data())
def test_a_lie_is_found_exactly_when_it_leads_outside(
    drawn: tuple[KvGeometry, int, int, int], data: st.DataObject
) -> None:
    geometry, *sizes = drawn
    layout = lay_out(geometry, *sizes)
    number = st.one_of(st.integers(0, 1 << 12), st.integers(0, (1 << 64) - 1), st.just(layout.num_bytes))
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(layout)]))
    value: Any = data.draw(number)
    if field in ("k_offsets", "v_offsets"):
        offsets = list(getattr(layout, field))
        offsets[data.draw(st.integers(0, len(offsets) - 1))] = value
        value = tuple(offsets)
    lie = dataclasses.replace(layout, **{field: value})
    outside = any(stop > lie.num_bytes for _, stop in areas(lie, geometry))
    assert (layout_problem(lie, geometry) is not None) == (outside or 0 in (lie.block_size, lie.num_blocks))


@pytest.mark.parametrize("field", ["k_offsets", "v_offsets"])
@pytest.mark.parametrize("offsets", [(), (0,), (0, 0, 0)])
def test_offsets_of_other_layers(field: str, offsets: tuple[int, ...]) -> None:
    geometry = KvGeometry((LayerGeometry(1, 2, 2),) * 2, "float32")
    changes: dict[str, Any] = {field: offsets}
    lie = dataclasses.replace(lay_out(geometry, 3, 4), **changes)
    assert layout_problem(lie, geometry) == f"layout.{field}: {len(offsets)} of a model with 2 layers"


def test_negative_numbers() -> None:
    geometry = KvGeometry((LayerGeometry(1, 2, 2),), "float32")
    layout = lay_out(geometry, 3, 4, 100)
    lies: list[dict[str, Any]] = [
        {"probe_offset": -1},
        {"k_offsets": (-512,)},
        {"probe_bytes": -1},
        {"num_blocks": -1},
    ]
    for changes in lies:
        assert layout_problem(dataclasses.replace(layout, **changes), geometry) is not None
