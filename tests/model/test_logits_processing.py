"""Masks, bias and penalties: a whole batch at once does to each row what plain Python does to it alone."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from kvbaton.model.logits_processing import process_logits
from kvbaton.model.sampling_rows import SamplingRow
from support.sampling import EOS, logits_of, row

INF = math.inf
VOCAB = 70
PROMPT, OUTPUT = [3, 4, 4, 9, 12, 60], [4, 5, 5, 5, 69, 0]


class Only:
    """A constraint that allows some tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def accept(self, token_id: int) -> None:
        raise AssertionError("the sampler accepts nothing")

    def fill(self, bitmask: torch.Tensor, row: int) -> None:
        words = [0] * bitmask.shape[1]
        for token_id in self.token_ids:
            words[token_id // 32] |= 1 << token_id % 32
        bitmask[row] = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)


def plainly_processed(logits: list[float], row: SamplingRow) -> list[float]:
    """The definition, token by token."""
    params, counts = row.params, Counter(row.output)
    never = set(params.banned_token_ids)
    if len(row.output) < params.min_tokens:
        never |= params.ending_token_ids(EOS)
    result = []
    for token, value in enumerate(logits):
        if row.constraint is not None and token not in row.constraint.token_ids:  # type: ignore[attr-defined]
            value = -INF
        if token in never or (params.allowed_token_ids and token not in params.allowed_token_ids):
            value = -INF
        value += params.logit_bias.get(token, 0)
        if token in {*row.prompt, *row.output}:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.presence_penalty * (counts[token] > 0) + params.frequency_penalty * counts[token]
        result.append(value)
    return result


CASES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -1.25},
    {"presence_penalty": -2.0, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"logit_bias": {0: 100.0, 4: -3.5, 69: 0.25}},
    {"allowed_token_ids": frozenset({2, 4, 5, 69})},
    {"banned_token_ids": frozenset({0, 1, 69})},
    {"min_tokens": len(OUTPUT) + 1, "stop_token_ids": frozenset({4, 7})},
    {"min_tokens": len(OUTPUT), "stop_token_ids": frozenset({4, 7})},
    {"min_tokens": len(OUTPUT) + 1, "stop_token_ids": frozenset({7}), "ignore_eos": True},
    {"constraint": Only(0, 4, 31, 32, 63, 69)},
    {
        "constraint": Only(0, 2, 4, 5, 31, 63, 69),
        "allowed_token_ids": frozenset({2, 4, 5, 69, 8}),
        "banned_token_ids": frozenset({5}),
        "min_tokens": 50,
        "logit_bias": {4: 2.0, 8: 100.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
    },
]


def rows_of(cases: list[dict[str, Any]]) -> list[SamplingRow]:
    return [row(n, prompt=PROMPT, output=OUTPUT, **case) for n, case in enumerate(cases)]


@pytest.mark.parametrize("case", CASES)
def test_a_row_alone(case: dict[str, Any]) -> None:
    logits = logits_of(1, vocab=VOCAB)
    rows = rows_of([case])
    expected = plainly_processed(logits[0].tolist(), rows[0])
    process_logits(logits, rows, EOS)
    assert logits[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (logits == -INF).any() == any(value == -INF for value in expected)


def test_rows_do_not_disturb_each_other() -> None:
    logits = logits_of(len(CASES), vocab=VOCAB)
    together = logits.clone()
    process_logits(together, rows_of(CASES), EOS)
    for n, case in enumerate(CASES):
        alone = logits[n : n + 1].clone()
        process_logits(alone, rows_of([case]), EOS)
        assert torch.equal(together[n], alone[0]), case


def test_an_empty_answer_and_prompt_have_nothing_to_penalise() -> None:
    logits = logits_of(1, vocab=VOCAB)
    before = logits.clone()
    penalties: dict[str, Any] = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    process_logits(logits, [row(**penalties)], EOS)
    assert torch.equal(logits, before)


def test_repetition_is_transformers_repetition() -> None:
    logits = logits_of(1, vocab=VOCAB)
    theirs: Callable[..., torch.Tensor] = transformers.RepetitionPenaltyLogitsProcessor(penalty=1.7)
    expected = theirs(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    process_logits(logits, [row(prompt=PROMPT, output=OUTPUT, repetition_penalty=1.7)], EOS)
    assert torch.allclose(logits, expected)


def test_the_smallest_penalty_makes_no_infinity() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    process_logits(logits, [row(prompt=[0, 2], repetition_penalty=1e-45)], EOS)
    assert bool(logits.isfinite().all())


def test_a_vocabulary_that_ends_within_a_word_of_the_mask() -> None:
    for vocab in (1, 31, 32, 33, 64, 65):
        logits = torch.zeros(1, vocab)
        process_logits(logits, [row(constraint=Only(vocab - 1))], EOS)
        assert logits[0].tolist() == [-INF] * (vocab - 1) + [0.0]
