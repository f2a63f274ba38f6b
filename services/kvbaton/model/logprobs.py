"""How likely tokens were: natural logarithms of probabilities, ranks, and the most likely tokens beside them."""

from collections.abc import Sequence

import torch

from kvbaton.engine.output import TokenLogprobs
from kvbaton.model.transfer import to_device

_CHUNK = 2**22
"""Logits whose probabilities are in memory at once: a prompt of 2,048 tokens may have 300 million."""


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """What is to be told about `token_ids` [n], each chosen by a row of `logits` [n, vocab].

    `num_top` says how many of the most likely tokens are reported beside each; those of probability 0 never are.
    Equal ones have the same rank, and are ordered by their ids.
    """
    step = max(1, _CHUNK // logits.shape[-1])
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), step):
        part = slice(start, start + step)
        found += _chunk(logits[part], token_ids[part], num_top[part])
    return found


def _chunk(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, to_device(token_ids, torch.int64, logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, best = logprobs.topk(min(max(num_top), logprobs.shape[-1]))
    lines = zip(token_ids, chosen[:, 0].tolist(), ranks.tolist(), best.tolist(), values.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(token_id, logprob, rank, _best(best_ids[:num], best_values[:num]))
        for token_id, logprob, rank, best_ids, best_values, num in lines
    ]


def _best(token_ids: list[int], values: list[float]) -> tuple[tuple[int, float], ...]:
    pairs = [pair for pair in zip(token_ids, values, strict=True) if pair[1] > float("-inf")]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
