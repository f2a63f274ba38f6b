"""What a step, or the arrival of KV, has changed: what handlers of requests are told."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.request import Request
from kvbaton.engine.sampling import FinishReason


# Made by the hundred in every step: a frozen one would cost several times as much.
@dataclass(slots=True)
class TokenSampled:
    """Token `index` of a request's output; `finish_reason` is set on the last."""

    request: Request
    index: int
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class StepResult:
    """What one step, or the arrival of KV, changed."""

    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    """Handed back for want of blocks."""
    sampled: list[TokenSampled] = field(default_factory=list)
    prompt_logprobs: list[tuple[Request, Sequence[TokenLogprobs]]] = field(default_factory=list)
    failed: list[tuple[Request, Exception]] = field(default_factory=list)
    """Requests that ended, each with its reason."""
    worked: bool = False
    """Whether anything was computed."""
