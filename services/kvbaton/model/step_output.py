"""What a step puts out, from its logits: sampled tokens, and logprobs of the prompts that it computed."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from kvbaton.engine.output import StepOutput, TokenLogprobs
from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.model import sampler
from kvbaton.model.logprobs import token_logprobs
from kvbaton.model.sampling_rows import sampling_rows
from kvbaton.model.transfer import to_device


def rows_to_keep(batch: Batch, sampled_rows: torch.Tensor) -> torch.Tensor:
    """Rows of the step's tokens whose logits `step_output` needs: `sampled_rows`, then those of prompts."""
    rows = _prompt_rows(batch)
    return torch.cat([sampled_rows, to_device(rows, torch.int64, sampled_rows.device)]) if rows else sampled_rows


def step_output(batch: Batch, logits: torch.Tensor, eos_token_ids: frozenset[int]) -> StepOutput:
    """From the `logits` [rows, vocab] of `rows_to_keep`."""
    rows = sampling_rows(batch)
    sampled = sampler.sample(logits[: len(rows)], rows, eos_token_ids) if rows else []
    if len(logits) == len(rows):
        return StepOutput(sampled)
    return StepOutput(sampled, _prompt_logprobs(batch, logits[len(rows) :]))


def _prompt_rows(batch: Batch) -> list[int]:
    """Rows of the step's tokens whose logits are needed for logprobs of prompts; none of them samples."""
    return [first + n for first, piece in _reporting(batch) for n in range(_num_reported(piece))]


def _prompt_logprobs(batch: Batch, logits: torch.Tensor) -> Mapping[str, Sequence[TokenLogprobs]]:
    """By request id, from the `logits` [rows, vocab] of `_prompt_rows`.

    A prompt token's logprob is by the row before it, so the last row of a chunk tells of the next chunk's first token.
    """
    token_ids: list[int] = []
    num_top: list[int] = []
    sizes: list[tuple[str, int]] = []
    for _, piece in _reporting(batch):
        num = _num_reported(piece)
        token_ids += piece.request.prompt[piece.start + 1 : piece.start + 1 + num]
        num_top += [piece.request.sampling.prompt_logprobs or 0] * num
        sizes.append((piece.request.request_id, num))
    found = iter(token_logprobs(logits, token_ids, num_top))
    return {request_id: [next(found) for _ in range(num)] for request_id, num in sizes}


def _reporting(batch: Batch) -> Iterator[tuple[int, Slice]]:
    """Slices whose prompt's logprobs were asked for, and the row where each begins. They were told before a resume."""
    first = 0
    for piece in batch.slices:
        request = piece.request
        if piece.is_prefill and request.sampling.prompt_logprobs is not None and not request.output:
            yield first, piece
        first += piece.num_tokens


def _num_reported(piece: Slice) -> int:
    # The prompt's last token predicts the answer's first.
    return min(piece.num_tokens, piece.request.num_prompt - 1 - piece.start)
