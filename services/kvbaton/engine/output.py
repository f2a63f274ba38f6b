"""What a step puts out besides KV: tokens, and how likely they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvbaton.engine.errors import InvalidArgumentError, KvbatonError, NotANumberError


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
    """NOT_A_NUMBER or NOTHING_ALLOWED when there is no answer."""
    logprobs: TokenLogprobs | None = None


NOT_A_NUMBER = -1
"""Stands for a token where logits were not numbers: that request ends, and no other."""

NOTHING_ALLOWED = -2
"""The same where the model had an answer, and what the request asks for together allows none."""


def no_token_error(why: int, index: int, constrained: bool) -> KvbatonError:
    """What a request ends with that has one of these two for token `index` of its answer."""
    if why == NOT_A_NUMBER:
        return NotANumberError(f"the logits of token {index} are not numbers")
    name = "structured_output" if constrained else "allowed_token_ids"
    return InvalidArgumentError(name, f"nothing is left that may be token {index} of the answer")


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a runner computed for one batch."""

    sampled: Sequence[SampledToken]
    """One for each slice that samples, in the batch's order."""
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """By request id, where asked for: one for each prompt token whose predecessor the slice computed."""
