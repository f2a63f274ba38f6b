"""A token is a function of its own row: logits, parameters, history, seed and position."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvbaton.engine.output import NOT_A_NUMBER, NOTHING_ALLOWED
from kvbaton.model import sampler
from kvbaton.model.sampler import most_likely, sample
from kvbaton.model.sampling_rows import SamplingRow
from support.sampling import EOS, logits_of, row

INF = math.inf
VOCAB = 256


def tokens_of(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return [token.token_id for token in sample(logits, rows, EOS)]


CHANGES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 3, "top_p": 0.5},
    {"top_k": 1},
    {"temperature": 5.0, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 2},
    {"logit_bias": {5: 20.0}, "banned_token_ids": frozenset({5, 6})},
    {"allowed_token_ids": frozenset(range(100, 140)), "top_p": 0.9, "logprobs": 0},
    {"min_tokens": 50, "stop_token_ids": frozenset({9})},
]
VARIETY = [row(n, 7 * n + 1, prompt=[n, n + 1, 3], output=[n, 4, 4], **CHANGES[n % len(CHANGES)]) for n in range(32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_alone_in_a_batch_and_in_any_order(dtype: torch.dtype) -> None:
    logits = logits_of(32, vocab=VOCAB).to(dtype)
    together = sample(logits, VARIETY, EOS)
    alone = [sample(logits[n : n + 1], [VARIETY[n]], EOS)[0] for n in range(32)]
    assert together == alone
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits[order], [VARIETY[n] for n in order], EOS)
    assert shuffled == [together[n] for n in order]


def test_the_logits_are_left_as_they_were() -> None:
    logits = logits_of(32, vocab=VOCAB)
    before = logits.clone()
    sample(logits, VARIETY, EOS)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 24, 128, 384, 385])
def test_greedy_is_the_argmax(vocab: int, dtype: torch.dtype) -> None:
    # Rounded to halves, so that many are equal.
    logits = ((logits_of(8, vocab=vocab) * 2).round() / 2).to(dtype)
    assert tokens_of(logits, [row(temperature=0.0)] * 8) == logits.argmax(-1).tolist()


def test_plain_rows_do_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "process_logits", None)
    monkeypatch.setattr(sampler, "_choose", None)
    monkeypatch.setattr(sampler, "token_logprobs", None)
    tokens_of(logits_of(2), [row(temperature=0.0), row(top_k=1)])
    with pytest.raises(TypeError):
        tokens_of(logits_of(2), [row(temperature=0.0), row()])


def test_seeds_and_positions_make_independent_draws() -> None:
    flat = torch.zeros(64, 1000)
    by_position = tokens_of(flat, [row(3, position) for position in range(64)])
    by_seed = tokens_of(flat, [row(seed) for seed in range(64)])
    # 64 draws of 1000: two are expected to meet; as a whole run they never repeat.
    assert len(set(by_position)) > 55
    assert len(set(by_seed)) > 55
    assert by_position != by_seed
    # Seed s at position p + 1 is not seed s + 1 at position p.
    diagonal = tokens_of(flat, [row(seed + 1) for seed in range(64)])
    shifted = tokens_of(flat, [row(seed, 1) for seed in range(64)])
    assert sum(a == b for a, b in zip(diagonal, shifted, strict=True)) < 5


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}])
def test_next_to_no_temperature_is_greedy(temperature: float, truncation: dict[str, Any]) -> None:
    logits = torch.tensor([[5.0, 9.0, 8.0], [-5.0, -9.0, -1.0]])
    rows = [row(4, position, temperature=temperature, **truncation) for position in (3, 4)]
    assert tokens_of(logits, rows) == [1, 2]


@pytest.mark.parametrize("least", [1.0, 0.999])
def test_the_highest_min_p_leaves_the_most_likely(least: float) -> None:
    logits = torch.tensor([[5.0, 9.0, 8.0, 9.0]])
    found = {tokens_of(logits, [row(4, position, temperature=50.0, min_p=least)])[0] for position in range(40)}
    assert found == {1, 3}


NO_ANSWER = {
    "nan": [math.nan] * 128,
    "one nan": [0.0] * 100 + [math.nan] + [1.0] * 27,
    "nothing": [-INF] * 128,
    "infinity": [0.0] * 100 + [INF] + [1.0] * 27,
}


@pytest.mark.parametrize("bad", list(NO_ANSWER))
@pytest.mark.parametrize("changes", [*CHANGES[:-2], {"top_p": 0.5, "logprobs": 5}])
def test_a_row_without_an_answer_ends_alone(bad: str, changes: dict[str, Any]) -> None:
    logits = logits_of(3, vocab=128)
    rows = [row(n, n, prompt=[n], output=[n], **changes) for n in range(3)]
    expected = sample(logits, rows, EOS)
    logits[1] = torch.tensor(NO_ANSWER[bad])
    found = sample(logits, rows, EOS)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert (found[1].token_id, found[1].logprobs) == (NOT_A_NUMBER, None)


def test_masks_that_leave_nothing_are_no_answer_and_no_fault_of_the_models() -> None:
    logits = torch.full((2, 8), -INF)
    logits[:, :4] = 0
    rows = [row(allowed_token_ids=frozenset({6, 7}), logprobs=1), row(allowed_token_ids=frozenset({3, 7}))]
    assert tokens_of(logits, rows) == [NOTHING_ALLOWED, 3]


def test_what_is_no_number_but_masked_does_not_matter() -> None:
    logits = torch.tensor([[1.0, math.nan, INF, 0.5]])
    assert tokens_of(logits, [row(temperature=0.0, banned_token_ids=frozenset({1, 2}))]) == [0]


def test_logprobs_are_after_bias_and_before_temperature() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    bias = {2: math.log(5)}
    [found] = sample(logits, [row(temperature=9.0, top_k=1, logit_bias=bias, logprobs=4)], EOS)
    assert found.logprobs is not None
    assert (found.token_id, found.logprobs.token_id, found.logprobs.rank) == (2, 2, 1)
    assert found.logprobs.logprob == pytest.approx(math.log(5 / 8))
    assert [value for _, value in found.logprobs.top[1:]] == pytest.approx([math.log(1 / 8)] * 3)


def test_only_those_who_ask_get_logprobs() -> None:
    rows = [row(), row(logprobs=0), row(temperature=0.0), row(temperature=0.0, logprobs=2)]
    found = [token.logprobs for token in sample(logits_of(4), rows, EOS)]
    assert [one is not None for one in found] == [False, True, False, True]
    assert [len(one.top) for one in found if one is not None] == [0, 2]


def test_bias_comes_before_penalties() -> None:
    # 1 + 1 = 2, halved: 1, below 1.5. The other way round it would be 0.5 + 1 = 1.5 and win, as the lower id.
    logits = torch.tensor([[1.0, 1.5]])
    rows = [row(temperature=0.0, prompt=[0], logit_bias={0: 1.0}, repetition_penalty=2.0)]
    assert tokens_of(logits, rows) == [1]


def test_top_k_counts_after_the_masks_and_min_p_after_temperature() -> None:
    logits = torch.tensor([[9.0, 2.0, 1.0, 0.0]])
    rows = [row(n, n, banned_token_ids=frozenset({0}), top_k=2, temperature=10.0) for n in range(50)]
    assert set(tokens_of(logits.expand(50, -1), rows)) == {1, 2}
    rows = [row(n, n, banned_token_ids=frozenset({0}), min_p=0.8, temperature=9.0) for n in range(50)]
    assert set(tokens_of(logits.expand(50, -1), rows)) == {1, 2, 3}


def test_most_likely_needs_no_contiguous_rows() -> None:
    logits = logits_of(128, vocab=256)
    assert torch.equal(most_likely(logits.T.contiguous().T), logits.argmax(-1))
