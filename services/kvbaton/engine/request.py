"""One sequence on one worker.

Life cycle (`Phase`), by the route that the request takes through this worker:

1. WAITING       no blocks yet.
2. RECEIVING     `Route.RECEIVE` only: blocks reserved, KV comes from a prefill worker.
   PREFILLING    `Route.HAND_OFF` and `Route.LOCAL`: blocks held, the prompt is computed in chunks.
3. HANDING_OFF   `Route.HAND_OFF` only: the first token is sampled; blocks stay until the KV has left.
   DECODING      `Route.RECEIVE` and `Route.LOCAL`: one token a step.
4. FINISHED      no blocks.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.engine.sampling import FinishReason, SamplingParams


class Route(enum.Enum):
    """What this worker does of a request."""

    HAND_OFF = "hand_off"
    """Prefill, sample the first token, keep the KV until it was moved."""
    RECEIVE = "receive"
    """Take KV and a first token from a peer, then decode."""
    LOCAL = "local"
    """Prefill and decode."""


class Phase(enum.Enum):
    """Where a request stands; see the module's life cycle."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    FINISHED = "finished"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.RECEIVING, Phase.PREFILLING, Phase.FINISHED}),
    Phase.RECEIVING: frozenset({Phase.DECODING, Phase.FINISHED}),
    Phase.PREFILLING: frozenset({Phase.HANDING_OFF, Phase.DECODING, Phase.FINISHED}),
    Phase.HANDING_OFF: frozenset({Phase.FINISHED}),
    Phase.DECODING: frozenset({Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}


@dataclass(slots=True)
class Milestones:
    """When a request passed each point, in seconds of the caller's clock; None while it has not."""

    arrived: float
    admitted: float | None = None
    prefill_started: float | None = None
    prefill_ended: float | None = None
    kv_ready: float | None = None
    decode_started: float | None = None
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A request's tokens, blocks and progress. Only the scheduler changes it."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    route: Route
    milestones: Milestones
    phase: Phase = Phase.WAITING
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Leading tokens whose KV is in the blocks."""
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.prompt)

    @property
    def num_uncomputed_prompt(self) -> int:
        """Prompt tokens that still need a forward pass."""
        return self.num_prompt - self.num_computed

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose KV this worker may ever hold for the request; the last sampled token never needs any."""
        if self.route is Route.HAND_OFF:
            return self.num_prompt
        return self.num_prompt + self.sampling.max_tokens - 1

    def move_to(self, phase: Phase) -> None:
        """Enter `phase`; only the transitions of `TRANSITIONS` exist."""
        assert phase in TRANSITIONS[self.phase], f"{self.request_id}: {self.phase} cannot become {phase}"
        self.phase = phase
