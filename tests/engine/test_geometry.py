"""The shape of a token's KV: sizes, and the groups of equal layers in which it travels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry, LayerGeometry

LAYERS = st.builds(LayerGeometry, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 2]))
GEOMETRIES = st.builds(
    KvGeometry, st.lists(LAYERS, min_size=1, max_size=12).map(tuple), st.sampled_from(sorted(DTYPE_BYTES))
)


@given(geometry=GEOMETRIES)
def test_groups_say_everything(geometry: KvGeometry) -> None:
    groups = geometry.groups()
    assert KvGeometry.from_groups(groups, geometry.dtype) == geometry
    assert all(count >= 1 for count, _ in groups)
    assert all(left != right for (_, left), (_, right) in zip(groups, groups[1:], strict=False))


@given(geometry=GEOMETRIES, num_tokens=st.integers(0, 9), data=st.data())
def test_spans_add_up(geometry: KvGeometry, num_tokens: int, data: st.DataObject) -> None:
    middle = data.draw(st.integers(0, geometry.num_layers))
    whole = geometry.span_bytes(0, geometry.num_layers, num_tokens)
    halves = geometry.span_bytes(0, middle, num_tokens) + geometry.span_bytes(middle, geometry.num_layers, num_tokens)
    assert whole == halves == num_tokens * geometry.token_bytes


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_sizes(dtype: str, size: int) -> None:
    geometry = KvGeometry((LayerGeometry(2, 8, 6), LayerGeometry(1, 4, 4)), dtype)
    assert geometry.layer_token_bytes == (28 * size, 8 * size)
    assert geometry.token_bytes == 36 * size
    assert geometry.span_bytes(1, 2, 10) == 80 * size


def test_groups_of_alternating_layers() -> None:
    one, other = LayerGeometry(2, 8, 8), LayerGeometry(1, 8, 8)
    assert KvGeometry((one, one, other, one), "float32").groups() == [(2, one), (1, other), (1, one)]


@pytest.mark.parametrize("dtype", ["float16", "", "torch.float32"])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of \['bfloat16', 'float32'\]"):
        KvGeometry.from_groups([(1, LayerGeometry(1, 1, 1))], dtype)


@pytest.mark.parametrize("groups", [[], [(0, LayerGeometry(1, 1, 1))]])
def test_a_model_without_layers_is_refused(groups: list[tuple[int, LayerGeometry]]) -> None:
    with pytest.raises(ValueError, match="without attention layers"):
        KvGeometry.from_groups(groups, "float32")


def test_the_largest_window_speaks_for_all() -> None:
    whole, narrow, wide = (LayerGeometry(1, 1, 1, window) for window in (None, 4, 9))
    assert KvGeometry((narrow, whole, wide), "float32").window == 9
    assert KvGeometry((whole, whole), "float32").window is None


@pytest.mark.parametrize(
    ("encoding", "layers"),
    [("", (112, 32)), ("bfloat16", (56, 16)), ("int8", (28 + 8, 8 + 4)), ("float8", (28 + 8, 8 + 4))],
)
@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_sizes_on_the_way(dtype: str, encoding: str, layers: tuple[int, ...]) -> None:
    geometry = KvGeometry((LayerGeometry(2, 8, 6), LayerGeometry(1, 4, 4)), dtype)
    expected = layers if encoding or dtype == "float32" else tuple(size // 2 for size in layers)
    assert geometry.encoded(encoding).layer_token_bytes == expected
    assert geometry.encoded(encoding).encoded("") == geometry


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoding 'int4' is not one of \['bfloat16', 'float8', 'int8'\]"):
        KvGeometry((LayerGeometry(1, 1, 1),), "float32").encoded("int4")
