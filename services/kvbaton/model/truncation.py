"""Which tokens may be drawn: top-k and top-p, without sorting the vocabulary where a CPU would have to."""

from collections.abc import Sequence

import torch

from kvbaton.model.transfer import to_device

_HEAD = 256
"""Tokens that are looked at first: they hold most nuclei, and 8 rows of 32,000 take a millisecond, not sixty."""


def keep_top(scaled: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's `top_k` tokens (0: all), and of them its `top_p` nucleus (1: all), most likely first.

    `scaled` is float32 [n, vocab], each row relative to its largest. Returns values and token ids [n, kept at most],
    -inf beyond what a row keeps. A token is in the nucleus while the probability of the tokens before it is below
    top_p, so one always is. Equal logits keep the order of their ids.
    """
    vocab_size = scaled.shape[-1]
    top_k = [min(k, vocab_size) or vocab_size for k in top_k]
    limits_k = to_device(top_k, torch.int64, scaled.device)[:, None]
    limits_p = to_device(top_p, torch.float64, scaled.device)[:, None]
    total = _total(scaled)
    # Whether a head was enough is known only afterwards: a CPU tells at once, a GPU sorts faster than it answers.
    head = max(_HEAD if k == vocab_size else 2 * k for k in top_k) if scaled.device.type == "cpu" else vocab_size
    while head < vocab_size:
        values, token_ids = _most_likely(scaled, head)
        least = values[:, -1]
        values = _cut(values, total, limits_k, limits_p)
        # Exact if all that is kept is likelier than what was left out. Rows that are not numbers have nothing to keep.
        last_kept = values.masked_fill(values == float("-inf"), float("inf")).amin(-1)
        if bool((last_kept > least).logical_or_(least.isnan()).all()):
            return values, token_ids
        head *= 8
    values, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    return _cut(values, total, limits_k, limits_p), token_ids


def _most_likely(scaled: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num` largest of each row and their ids, best first, equals by their ids."""
    _, token_ids = scaled.topk(num, sorted=False)
    token_ids = token_ids.sort(dim=-1).values
    values, order = scaled.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(-1, order)


def _total(scaled: torch.Tensor) -> torch.Tensor:
    # In float64 the order of the sum, which may depend on the batch, does not show.
    return scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)


def _cut(values: torch.Tensor, total: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf, in rows of descending `values` [n, m], what is beyond `top_k` and `top_p` [n, 1].

    `total` [n, 1] is the sum of exp over the whole vocabulary.
    """
    rank = torch.arange(values.shape[-1], device=values.device)
    weights = values.exp().double().masked_fill_(rank >= top_k, 0)
    sums = weights.cumsum(-1)
    mass = torch.where(top_k <= values.shape[-1], sums[:, -1:], total)
    outside = (sums - weights >= top_p * mass).logical_and_(rank > 0).logical_and_(top_p < 1)
    return values.masked_fill(outside.logical_or_(rank >= top_k), float("-inf"))
