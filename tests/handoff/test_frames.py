"""However layers get ready and whatever the geometry is, frames cover every token of every layer once, in an order
that the receiver takes, and none is too large.
"""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.frames import Coverage, FramePlanner, Rectangle

layers = st.builds(
    LayerGeometry, st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.none() | st.integers(1, 9)
)
geometries = st.builds(
    KvGeometry,
    # Runs of equal layers as well as changes between them.
    st.lists(st.tuples(layers, st.integers(1, 4)), min_size=1, max_size=4).map(
        lambda runs: tuple(layer for layer, count in runs for _ in range(count))
    ),
    st.sampled_from(["float32", "bfloat16"]),
)
ONE = LayerGeometry(1, 1, 1)  # 8 bytes a token
WINDOWED = LayerGeometry(1, 1, 1, window=3)


def drain(planner: FramePlanner) -> Iterator[Rectangle]:
    while (rectangle := planner.next()) is not None:
        yield rectangle


@st.composite
def chunked_prefills(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """First and last token to send, and the chunks' ends; the receiver may lack less than the first chunk computes."""
    chunks = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    ends = [sum(chunks[: index + 1]) for index in range(len(chunks))]
    return draw(st.integers(0, ends[-1] - 1)), ends[-1], ends


@given(geometries, chunked_prefills(), st.integers(1, 2000), st.data())
def test_frames_cover_everything_once_whenever_they_are_asked_for(
    geometry: KvGeometry, prefill: tuple[int, int, list[int]], frame_bytes: int, data: st.DataObject
) -> None:
    start, stop, ends = prefill
    window_start = data.draw(st.integers(start, stop))
    planner = FramePlanner(geometry, start, stop, frame_bytes)
    coverage = Coverage(geometry, range(start, stop), window_start)
    seen: set[tuple[int, int]] = set()

    def take() -> None:
        for rectangle in drain(planner):
            assert coverage.problem(rectangle) is None
            coverage.add(rectangle)
            cells = {(layer, token) for layer in rectangle.layers for token in rectangle.tokens}
            assert cells
            assert not cells & seen
            seen.update(cells)
            assert all(token < ready[layer] for layer, token in cells), "sent before it was computed"
            size = geometry.span_bytes(rectangle.layers.start, rectangle.layers.stop, len(rectangle.tokens))
            assert size <= frame_bytes or (len(rectangle.layers), len(rectangle.tokens)) == (1, 1)

    ready = [0] * geometry.num_layers
    # The receiver may answer before anything is computed, or when all is.
    begun = data.draw(st.integers(0, len(ends)))
    for number, end in enumerate(ends):
        if number == begun:
            planner.begin(window_start)
        for layer in range(geometry.num_layers):
            planner.advance(layer, end)
            ready[layer] = end
            if number >= begun and data.draw(st.booleans()):
                take()
    if begun == len(ends):
        planner.begin(window_start)
    take()
    assert planner.all_ready
    assert planner.all_sent
    assert coverage.complete
    first = [start if layer.window is None else window_start for layer in geometry.layers]
    assert seen == {(layer, token) for layer in range(geometry.num_layers) for token in range(first[layer], stop)}


def test_a_small_prompt_goes_in_one_frame_however_it_was_computed() -> None:
    planner = FramePlanner(KvGeometry((ONE,) * 4, "float32"), 0, 10)
    for end in (3, 10):
        for layer in range(4):
            assert list(drain(planner)) == []
            planner.advance(layer, end)
    assert list(drain(planner)) == [Rectangle(range(4), range(10))]


def test_a_half_full_frame_leaves_before_the_rest_is_computed() -> None:
    planner = FramePlanner(KvGeometry((ONE,) * 4, "float32"), 0, 10, frame_bytes=160)
    planner.advance(0, 10)
    assert list(drain(planner)) == [Rectangle(range(1), range(10))]
    assert not planner.all_ready
    assert not planner.all_sent


def test_a_token_that_is_larger_than_a_frame_travels_alone() -> None:
    planner = FramePlanner(KvGeometry((ONE,) * 2, "float32"), 4, 6, frame_bytes=3)
    for layer in range(2):
        planner.advance(layer, 6)
    assert list(drain(planner)) == [Rectangle(range(a, a + 1), range(t, t + 1)) for a in range(2) for t in (4, 5)]


def test_reports_that_repeat_go_back_or_run_ahead_change_nothing() -> None:
    planner = FramePlanner(KvGeometry((ONE,), "float32"), 2, 5)
    for end in (1, 4, 3, 4, 9):
        planner.advance(0, end)
    assert list(drain(planner)) == [Rectangle(range(1), range(2, 5))]


def test_layers_share_frames_from_where_they_begin_alike() -> None:
    planner = FramePlanner(KvGeometry((ONE, WINDOWED, WINDOWED, ONE), "float32"), 2, 10)
    planner.begin(6)
    for layer in range(4):
        planner.advance(layer, 10)
    assert list(drain(planner)) == [
        Rectangle(range(1), range(2, 10)),
        Rectangle(range(1, 3), range(6, 10)),
        Rectangle(range(3, 4), range(2, 10)),
    ]


@pytest.mark.parametrize("window_start", [0, 1, 11])
def test_a_window_that_begins_outside_the_transfer_is_refused(window_start: int) -> None:
    planner = FramePlanner(KvGeometry((WINDOWED,), "float32"), 2, 10)
    with pytest.raises(ValueError, match=rf"window start {window_start} of tokens \[2, 10\)"):
        planner.begin(window_start)


def test_what_a_window_leaves_out_must_not_come() -> None:
    coverage = Coverage(KvGeometry((ONE, WINDOWED), "float32"), range(2, 10), 6)
    assert coverage.problem(Rectangle(range(1, 2), range(2, 10))) == (
        "layer 1 continues at token 6, the frame begins at 2"
    )
    assert coverage.problem(Rectangle(range(2), range(2, 10))) is not None
    coverage.add(Rectangle(range(1), range(2, 10)))
    assert not coverage.complete
    coverage.add(Rectangle(range(1, 2), range(6, 10)))
    assert coverage.complete


@pytest.mark.parametrize(
    ("rectangle", "problem"),
    [
        (Rectangle(range(2), range(5, 6)), "layer 0 continues at token 4, the frame begins at 5"),
        (Rectangle(range(2), range(3, 6)), "layer 0 continues at token 4, the frame begins at 3"),
        (Rectangle(range(2, 3), range(4, 6)), "layer 2 continues at token 2, the frame begins at 4"),
        (Rectangle(range(1, 3), range(4, 6)), "layer 2 continues at token 2, the frame begins at 4"),
        (Rectangle(range(3, 4), range(2, 6)), r"layers \[3, 4\) of a model with 3"),
        (Rectangle(range(1, 1), range(4, 6)), r"layers \[1, 1\)"),
        (Rectangle(range(2, 1), range(4, 6)), r"layers \[2, 1\)"),
        (Rectangle(range(2), range(4, 11)), r"tokens \[4, 11\) of a transfer that ends at 10"),
        (Rectangle(range(2), range(4, 4)), r"tokens \[4, 4\)"),
        (Rectangle(range(2), range(6, 4)), r"tokens \[6, 4\)"),
    ],
)
def test_coverage_refuses_gaps_repeats_and_what_lies_outside(rectangle: Rectangle, problem: str) -> None:
    coverage = Coverage(KvGeometry((ONE,) * 3, "float32"), range(2, 10), 2)
    first = Rectangle(range(2), range(2, 4))
    assert coverage.problem(first) is None
    coverage.add(first)
    found = coverage.problem(rectangle)
    assert found is not None
    assert re.search(problem, found)
    assert not coverage.complete


def test_coverage_is_complete_when_the_last_layer_is() -> None:
    coverage = Coverage(KvGeometry((ONE,) * 2, "float32"), range(4), 0)
    for rectangle in (
        Rectangle(range(2), range(2)),
        Rectangle(range(1), range(2, 4)),
        Rectangle(range(1, 2), range(2, 4)),
    ):
        assert not coverage.complete
        assert coverage.problem(rectangle) is None
        coverage.add(rectangle)
    assert coverage.complete
