"""From a batch to what the sampler needs of it: whose logits, with which parameters and history."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvbaton.engine.constraint import Constraint
from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.model.logprobs import token_logprobs


@dataclass(slots=True)
class SamplingRow:
    """One row of logits that a token is chosen by."""

    params: SamplingParams
    position: int
    """Where the token will stand in its sequence, prompt included."""
    prompt: Sequence[int]
    output: Sequence[int]
    constraint: Constraint | None = None


def sampling_rows(batch: Batch) -> list[SamplingRow]:
    """A row for each slice that samples, in the batch's order."""
    return [
        SamplingRow(piece.request.sampling, piece.start + piece.num_tokens, piece.request.prompt, piece.request.output)
        for piece in batch.slices
        if piece.samples
    ]


def prompt_rows(batch: Batch) -> list[int]:
    """Rows of the step's tokens whose logits are needed for logprobs of prompts, besides those that sample."""
    return [first + n for first, piece in _reporting(batch) for n in range(_num_reported(piece))]


def prompt_logprobs(batch: Batch, logits: torch.Tensor) -> Mapping[str, Sequence[TokenLogprobs]]:
    """By request id, from the `logits` [rows, vocab] of `prompt_rows`.

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
