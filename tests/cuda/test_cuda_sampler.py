"""On a GPU: the sampler's tokens are those that it gives on a CPU, with one wait for the device."""

import warnings

import pytest
import torch

from kvbaton.engine.output import NOT_A_NUMBER
from kvbaton.model.sampler import sample
from kvbaton.model.sampling_rows import SamplingRow
from support.sampling import EOS, logits_of, row

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCAB = 1000
ROWS: list[SamplingRow] = [
    row(0, temperature=0.0),
    row(1),
    row(2, top_k=20, top_p=0.9),
    row(3, top_p=0.8, min_p=0.01, temperature=2.0),
    row(4, prompt=[1, 2, 3], output=[3, 3], repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    row(5, logit_bias={7: 30.0}, banned_token_ids=frozenset({7}), min_tokens=3),
    row(6, allowed_token_ids=frozenset({10, 11, 12}), temperature=0.0),
]


def test_tokens_and_logprobs_are_those_of_the_cpu() -> None:
    logits = logits_of(len(ROWS) + 1, vocab=VOCAB)
    logits[-1] = float("nan")
    rows = [*ROWS, row(7, logprobs=3)]
    on_cpu, on_gpu = sample(logits, rows, EOS), sample(logits.cuda(), rows, EOS)
    assert [token.token_id for token in on_gpu] == [token.token_id for token in on_cpu]
    assert on_gpu[-1].token_id == NOT_A_NUMBER


def test_nothing_but_the_tokens_is_waited_for() -> None:
    logits = logits_of(len(ROWS), vocab=VOCAB).cuda()
    sample(logits, ROWS, EOS)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sample(logits, ROWS, EOS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(one.message) for one in warned) == 1
