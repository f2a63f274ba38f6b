"""What a worker is asked to do, as it comes: checked against the model, before it takes its place among others."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.constraint import Constraint
from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.request import Milestones, Request, Route
from kvbaton.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """What a worker is asked to do."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    route: Route
    output: Sequence[int] = ()
    """Tokens that were generated before: the request goes on after them."""
    priority: int = 0
    """Smaller is served first."""
    cache_salt: str = ""
    """Requests share KV with those of the same salt only."""
    constraint: Constraint | None = None
    """What the answer must look like; it has accepted `output` already."""


def check(new: NewRequest, max_model_len: int) -> None:
    """Raises InvalidArgumentError for what no worker with this context could do."""
    max_tokens = new.sampling.max_tokens
    if not new.prompt:
        raise InvalidArgumentError("prompt", "is empty")
    if len(new.prompt) + max_tokens > max_model_len:
        total = f"{len(new.prompt)} tokens and max_tokens {max_tokens}"
        raise InvalidArgumentError("prompt", f"{total} exceed the context of {max_model_len}")
    if len(new.output) >= max_tokens:
        problem = f"{len(new.output)} tokens leave nothing of max_tokens {max_tokens}"
        raise InvalidArgumentError("output_token_ids", problem)


def begin(new: NewRequest, arrival: int, now: float) -> Request:
    """The request as it stands at its arrival, `now`, the `arrival`-th here."""
    return Request(
        new.request_id,
        new.prompt,
        new.sampling,
        new.route,
        Milestones(arrived=now),
        output=list(new.output),
        num_resumed=len(new.output),
        priority=new.priority,
        arrival=arrival,
        cache_salt=new.cache_salt,
        constraint=new.constraint,
    )
