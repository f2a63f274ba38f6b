"""Choosing the next token, for a whole batch whose rows ask for different things.

Order of operations: masks, bias and penalties (`logits_processing`); then what logprobs report; then temperature,
top-k, top-p (`truncation`) and min-p; then the draw (`noise`). docs/sampling.md says the same to users.
"""

import math
from collections.abc import Sequence

import torch

from kvbaton.engine.output import NOT_A_NUMBER, NOTHING_ALLOWED, SampledToken
from kvbaton.model.logits_processing import process_logits
from kvbaton.model.logprobs import token_logprobs
from kvbaton.model.noise import gumbel_noise, signed
from kvbaton.model.sampling_rows import SamplingRow
from kvbaton.model.transfer import to_device
from kvbaton.model.truncation import keep_top

# Below this float32 has no normal numbers.
_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny

_BLOCK = 128
_CPU_CHUNK, _GPU_CHUNK = 2**16, 2**24
"""Draws made at once: what fits a core's cache, and what a GPU has room for."""


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> list[SampledToken]:
    """One token for each row of `logits` [n, vocab], which are not changed.

    A row whose largest logit, after the masks, is not finite has no answer: its token is NOT_A_NUMBER, or
    NOTHING_ALLOWED where the largest was finite before them.
    """
    device = logits.device
    asking = [n for n, row in enumerate(rows) if row.constraint is not None or not row.params.is_plain]
    if not asking:
        return [SampledToken(token_id) for token_id in most_likely(logits).tolist()]
    index = to_device(asking, torch.int64, device)
    asked = [rows[n] for n in asking]
    scores = logits.index_select(0, index).float()
    process_logits(scores, asked, eos_token_ids)
    chosen = _choose(scores, asked)
    tokens = chosen if len(asking) == len(rows) else most_likely(logits).index_copy_(0, index, chosen)
    # The only wait for the device, unless logprobs are asked for.
    sampled = [SampledToken(token_id) for token_id in tokens.tolist()]
    for n in asking:
        if sampled[n].token_id == NOT_A_NUMBER and int(most_likely(logits[n : n + 1])) != NOT_A_NUMBER:
            sampled[n] = SampledToken(NOTHING_ALLOWED)
    reported = [(line, n) for line, n in enumerate(asking) if _reports(rows[n], sampled[n])]
    if reported:
        lines = to_device([line for line, _ in reported], torch.int64, device)
        token_ids = [sampled[n].token_id for _, n in reported]
        num_top = [rows[n].params.logprobs or 0 for _, n in reported]
        found = token_logprobs(scores.index_select(0, lines), token_ids, num_top)
        for (_, n), logprobs in zip(reported, found, strict=True):
            sampled[n] = SampledToken(sampled[n].token_id, logprobs)
    return sampled


def _reports(row: SamplingRow, token: SampledToken) -> bool:
    return row.params.logprobs is not None and token.token_id not in (NOT_A_NUMBER, NOTHING_ALLOWED)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit's token of each row [n], the lowest of equal ones; NOT_A_NUMBER where it is not finite."""
    chosen = _argmax(logits)
    finite = logits.gather(-1, chosen[:, None])[:, 0].isfinite()
    return chosen.masked_fill_(finite.logical_not_(), NOT_A_NUMBER)


def _argmax(values: torch.Tensor) -> torch.Tensor:
    """`values.argmax(-1)`. On a CPU torch vectorises the search for a maximum, but not the one for its place."""
    num, width = values.shape
    if values.device.type != "cpu" or width % _BLOCK:
        return values.argmax(-1)
    blocks = values.reshape(num, -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    return block * _BLOCK + blocks[torch.arange(num), block].argmax(-1)


def _choose(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Tokens [n] by the processed logits [n, vocab]."""
    chosen = most_likely(scores)
    drawing = [n for n, row in enumerate(rows) if not row.params.is_greedy]
    whole = [n for n in drawing if not rows[n].params.top_k and rows[n].params.top_p == 1]
    truncated = [n for n in drawing if rows[n].params.top_k or rows[n].params.top_p < 1]
    for members, draw in ((whole, _draw_from_all), (truncated, _draw_from_top)):
        if members:
            index = to_device(members, torch.int64, scores.device)
            drawn = draw(scores.index_select(0, index), [rows[n] for n in members])
            best = chosen.index_select(0, index)
            chosen.index_copy_(0, index, torch.where(best == NOT_A_NUMBER, best, drawn))
    return chosen


def _draw_from_all(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """A draw for each row; chunk by chunk, in the cache."""
    device, vocab_size = scores.device, scores.shape[-1]
    step = max(1, (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // vocab_size)
    token_ids = torch.arange(vocab_size, device=device)[None]
    drawn = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        scaled = _mask_unlikely(_scaled(scores[start : start + step], part), part)
        drawn.append(_argmax(scaled.add_(_noise(part, token_ids))))
    return torch.cat(drawn)


def _draw_from_top(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """A draw for each row, among the tokens that top-k and top-p leave."""
    scaled = _scaled(scores, rows)
    values, token_ids = keep_top(scaled, [row.params.top_k for row in rows], [row.params.top_p for row in rows])
    place = _mask_unlikely(values, rows).add_(_noise(rows, token_ids)).argmax(-1)
    return token_ids.gather(-1, place[:, None])[:, 0]


def _scaled(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    # Relative to the largest, so that dividing by next to nothing makes the others -inf and never the largest inf.
    temperatures = [max(row.params.temperature, _SMALLEST_TEMPERATURE) for row in rows]
    relative = scores - scores.amax(-1, keepdim=True)
    return relative.div_(to_device(temperatures, torch.float32, scores.device)[:, None])


def _mask_unlikely(scaled: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """min-p (Nguyen et al. 2024), in place: `scaled` is the logarithm of the ratio to the most likely token."""
    if not any(row.params.min_p for row in rows):
        return scaled
    least = [math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows]
    return scaled.masked_fill_(scaled < to_device(least, torch.float32, scaled.device)[:, None], -math.inf)


def _noise(rows: Sequence[SamplingRow], token_ids: torch.Tensor) -> torch.Tensor:
    seeds = to_device([signed(row.params.seed) for row in rows], torch.int64, token_ids.device)
    positions = to_device([row.position for row in rows], torch.int64, token_ids.device)
    return gumbel_noise(seeds, positions, token_ids)
