"""What a step puts out besides KV: tokens, and how likely they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's natural-log probability, and the most likely tokens beside it.

    After penalties, bias and masks, before temperature and truncation.
    """

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token; equal ones have the same rank."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), best first; as many as the request asked for."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The choice for one slice that samples."""

    token_id: int
    """NOT_A_NUMBER or NO_TOKEN when there is none."""
    logprobs: TokenLogprobs | None = None


NOT_A_NUMBER = -1
"""Stands for a token where logits were not numbers: that request ends, and no other."""

NO_TOKEN = -2
"""Stands for a token where all were masked: what the request asks for excludes itself, and it ends."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a runner computed for one batch."""

    sampled: Sequence[SampledToken]
    """One for each slice that samples, in the batch's order."""
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """By request id, where asked for: one for each prompt token whose predecessor the slice computed."""
