"""What changes a row's logits before a token is chosen: masks, then bias, then penalties.

Every step touches the whole batch at once and only the entries that it changes. Penalties are those of
`transformers` and vLLM: repetition (Keskar et al. 2019, "CTRL") over prompt and answer, presence and frequency over
the answer.
"""

from collections.abc import Iterable, Sequence

import torch

from kvbaton.engine.sampling import SamplingParams
from kvbaton.model.sampling_rows import SamplingRow
from kvbaton.model.transfer import entries_to_device, to_device

_NEVER = float("-inf")
_LARGEST = torch.finfo(torch.float32).max


def process_logits(logits: torch.Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> None:
    """Change `logits`, float32 [n, vocab], in place, as each row asks."""
    _mask_by_constraints(logits, rows)
    _mask_all_but_allowed(logits, rows)
    _mask_never_sampled(logits, rows, eos_token_ids)
    _add_bias(logits, rows)
    _penalise_repetition(logits, rows)
    _penalise_output(logits, rows)


def _mask_by_constraints(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    constrained = [(n, row.constraint) for n, row in enumerate(rows) if row.constraint is not None]
    if not constrained:
        return
    vocab_size, device = logits.shape[-1], logits.device
    bitmask = torch.full((len(constrained), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for line, (_, constraint) in enumerate(constrained):
        constraint.fill(bitmask, line)
    words = bitmask.to(device, non_blocking=True)[:, :, None]
    allowed = (words >> torch.arange(32, dtype=torch.int32, device=device)).bitwise_and_(1)
    forbidden = (allowed == 0).flatten(1)[:, :vocab_size]
    index = to_device([n for n, _ in constrained], torch.int64, device)
    logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(forbidden, _NEVER))


def _mask_all_but_allowed(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    lists = [(n, row.params.allowed_token_ids) for n, row in enumerate(rows) if row.params.allowed_token_ids]
    if not lists:
        return
    at = entries_to_device(lists, logits.device)
    kept = logits[at]
    logits.index_fill_(0, to_device([n for n, _ in lists], torch.int64, logits.device), _NEVER)
    logits[at] = kept


def _mask_never_sampled(logits: torch.Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> None:
    lists: list[tuple[int, Iterable[int]]] = []
    for n, row in enumerate(rows):
        if row.params.banned_token_ids:
            lists.append((n, row.params.banned_token_ids))
        if len(row.output) < row.params.min_tokens:
            lists.append((n, row.params.ending_token_ids(eos_token_ids)))
    if lists:
        at = entries_to_device(lists, logits.device)
        logits.index_put_(at, torch.full((), _NEVER, device=logits.device))


def _add_bias(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    biases = [(n, row.params.logit_bias) for n, row in enumerate(rows) if row.params.logit_bias]
    if biases:
        values = [bias for _, biases_of_row in biases for bias in biases_of_row.values()]
        at = entries_to_device(biases, logits.device)
        logits.index_put_(at, to_device(values, torch.float32, logits.device), accumulate=True)


def _penalise_repetition(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    penalised = [(n, row) for n, row in enumerate(rows) if row.params.repetition_penalty != 1]
    if not penalised:
        return
    lists = [(n, tokens) for n, row in penalised for tokens in (row.prompt, row.output)]
    at = entries_to_device(lists, logits.device)
    factor = _by_row([row.params.repetition_penalty for row in rows], logits.device)[at[0]]
    values = logits[at]
    # A token that stands there twice is written twice, with the same value. A factor near 0 must not make infinity.
    logits[at] = torch.where(values > 0, (values / factor).clamp_(max=_LARGEST), values * factor)


def _penalise_output(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    lists = [(n, row.output) for n, row in enumerate(rows) if _penalises_output(row.params) and row.output]
    if not lists:
        return
    at = entries_to_device(lists, logits.device)
    presence = _by_row([row.params.presence_penalty for row in rows], logits.device)
    frequency = _by_row([row.params.frequency_penalty for row in rows], logits.device)
    logits[at] = logits[at] - presence[at[0]]
    # Equal terms: the order in which they are added does not matter.
    logits.index_put_(at, -frequency[at[0]], accumulate=True)


def _penalises_output(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def _by_row(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return to_device(values, torch.float32, device)
