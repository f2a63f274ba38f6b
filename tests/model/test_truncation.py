"""top-k and top-p keep what they say, whether the head of a row is looked at or all of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.model import truncation
from kvbaton.model.truncation import keep_top

INF = math.inf


def kept(logits: torch.Tensor, top_k: list[int], top_p: list[float]) -> list[list[int]]:
    """The tokens that each row keeps, best first."""
    values, token_ids = keep_top(logits - logits.amax(-1, keepdim=True), top_k, top_p)
    rows = zip(values.tolist(), token_ids.tolist(), strict=True)
    return [[token for value, token in zip(*row, strict=True) if value > -INF] for row in rows]


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "expected"),
    [
        ([1.0, 3.0, 2.0], 1, 1.0, [1]),
        ([1.0, 3.0, 2.0], 2, 1.0, [1, 2]),
        ([1.0, 3.0, 2.0], 3, 1.0, [1, 2, 0]),
        ([1.0, 3.0, 2.0], 99, 1.0, [1, 2, 0]),
        ([1.0, 3.0, 2.0], 2**32 - 1, 1.0, [1, 2, 0]),
        ([1.0, 3.0, 2.0], 0, 1.0, [1, 2, 0]),
        ([1.0, 3.0, 2.0], 0, 5e-324, [1]),
        ([1.0, 3.0, 2.0], 0, 0.6, [1]),  # 0.665, 0.245, 0.090
        ([1.0, 3.0, 2.0], 0, 0.7, [1, 2]),
        ([1.0, 3.0, 2.0], 2, 0.72, [1]),  # 0.731 of the two that are left
        # Of equals, the lower ids.
        ([2.0, 2.0, 2.0, 2.0], 2, 1.0, [0, 1]),
        ([2.0, 2.0, 2.0, 2.0], 0, 0.5, [0, 1]),
        ([2.0, 2.0, 2.0, 2.0], 0, 0.51, [0, 1, 2]),
        ([0.0, 5.0, 5.0], 1, 1.0, [1]),
        # Nothing is lost without a nucleus, however far the sum of the first is rounded up to 1.
        ([100.0, 0.0, -100.0], 0, 1.0, [0, 1, 2]),
        # What is masked already stays so.
        ([1.0, -INF, 2.0], 3, 1.0, [2, 0]),
        ([1.0, -INF, 2.0], 0, 0.999999, [2, 0]),
    ],
)
def test_what_is_kept(logits: list[float], top_k: int, top_p: float, expected: list[int]) -> None:
    assert kept(torch.tensor([logits]), [top_k], [top_p]) == [expected]


def test_values_are_those_of_their_tokens() -> None:
    scaled = torch.tensor([[-1.0, 0.0, -2.0, -0.5]])
    values, token_ids = keep_top(scaled, [3], [1.0])
    assert torch.equal(values[values > -INF], scaled[0, token_ids[values > -INF]])


LOGITS = st.lists(st.integers(-6, 6), min_size=40, max_size=40)
ROW = st.tuples(LOGITS, st.sampled_from([0, 1, 2, 3, 7, 19, 20, 21, 39, 40, 41]), st.floats(2**-6, 1, width=32))


def plainly_kept(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """The definition, token by token, in float64."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    weights = [math.exp(logits[token] - logits[ranked[0]]) for token in ranked]
    before = [math.fsum(weights[:n]) for n in range(len(weights))]
    limit = top_p * math.fsum(weights)
    return [token for n, token in enumerate(ranked) if n == 0 or top_p == 1 or before[n] < limit]


@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from([1, 2, 5, 64]))
def test_any_head_keeps_what_the_definition_says(rows: list[tuple[list[int], int, float]], head: int) -> None:
    logits = torch.tensor([[value / 16 for value in row[0]] for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_HEAD", head)
        found = kept(logits, [row[1] for row in rows], [row[2] for row in rows])
    assert found == [
        plainly_kept(row, top_k, top_p) for row, (_, top_k, top_p) in zip(logits.tolist(), rows, strict=True)
    ]


def test_the_head_is_enough_for_most_rows_and_others_do_not_lose() -> None:
    vocab = 5000
    steep = torch.linspace(0, -80, vocab)
    flat = torch.zeros(vocab)
    assert kept(steep[None], [0], [0.9])[0] == kept(torch.stack([steep, flat]), [0, 0], [0.9, 0.9])[0]
    assert len(kept(flat[None], [0], [0.9])[0]) == 4500
    assert keep_top(steep[None], [0], [0.9])[0].shape == (1, 256)
    assert keep_top(steep[None], [50], [1.0])[0].shape == (1, 100)


def test_a_row_without_numbers_does_not_disturb_the_others() -> None:
    good = torch.linspace(0, -80, 1000)
    rows = torch.stack([good, torch.full_like(good, math.nan)])
    values, token_ids = keep_top(rows, [0, 0], [0.9, 0.9])
    assert values.shape == (2, 256)
    alone, ids_alone = keep_top(good[None], [0], [0.9])
    assert torch.equal(values[:1], alone)
    assert torch.equal(token_ids[:1], ids_alone)
