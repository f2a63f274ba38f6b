"""Logprobs are the softmax's logarithms, ranks count from 1, and the most likely come first."""

import math

import pytest
import torch

from kvbaton.engine.output import TokenLogprobs
from kvbaton.model import logprobs
from kvbaton.model.logprobs import token_logprobs
from support.sampling import logits_of

INF = math.inf


def test_logprobs_of_known_probabilities() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log() + 5
    [found] = token_logprobs(logits, [1], [2])
    assert (found.token_id, found.rank) == (1, 3)
    assert found.logprob == pytest.approx(math.log(0.2))
    assert [token for token, _ in found.top] == [3, 2]
    assert [value for _, value in found.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_each_row_has_as_many_as_it_asked_for() -> None:
    logits = logits_of(4)
    found = token_logprobs(logits, [5, 6, 7, 8], [0, 3, 20, 1])
    assert [len(one.top) for one in found] == [0, 3, 20, 1]
    for line, one in enumerate(found):
        expected = logits[line].double().log_softmax(-1)
        ordered = expected.argsort(descending=True)
        assert one.logprob == pytest.approx(float(expected[5 + line]), abs=1e-5)
        assert [token for token, _ in one.top] == ordered[: len(one.top)].tolist()
        assert ordered[one.rank - 1] == one.token_id


def test_equal_tokens_have_one_rank_and_the_order_of_their_ids() -> None:
    found = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 2), [3, 0], [3, 3])
    assert [one.rank for one in found] == [1, 4]
    assert [[token for token, _ in one.top] for one in found] == [[1, 2, 3]] * 2


def test_what_cannot_be_sampled_is_not_among_the_most_likely() -> None:
    [found] = token_logprobs(torch.tensor([[-INF, 0.0, -INF]]), [1], [3])
    assert found == TokenLogprobs(1, 0.0, 1, ((1, 0.0),))


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    assert len(token_logprobs(logits_of(1, vocab=4), [1], [20])[0].top) == 4


def test_long_prompts_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens, num_top = logits_of(10).bfloat16(), list(range(10)), [n % 3 for n in range(10)]
    whole = token_logprobs(logits, tokens, num_top)
    monkeypatch.setattr(logprobs, "_CHUNK", 3 * logits.shape[-1])
    assert token_logprobs(logits, tokens, num_top) == whole


def test_nothing_asked_is_nothing_told() -> None:
    assert token_logprobs(torch.zeros(0, 5), [], []) == []
