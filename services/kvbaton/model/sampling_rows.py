"""From a batch to the rows that the sampler works on."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.constraint import Constraint
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Slice


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
    return [_row(piece) for piece in batch.slices if piece.samples]


def _row(piece: Slice) -> SamplingRow:
    request = piece.request
    position = piece.start + piece.num_tokens
    return SamplingRow(request.sampling, position, request.prompt, request.output, request.constraint)
