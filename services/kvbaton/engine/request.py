"""One sequence on one worker.

Life cycle (`Phase`), by the route that the request takes through this worker:

1. WAITING       no blocks yet.
2. RECEIVING     `Route.RECEIVE` only: blocks reserved, KV comes from a prefill worker.
   PREFILLING    `Route.HAND_OFF` and `Route.LOCAL`: blocks held, the prompt is computed in chunks.
3. HANDING_OFF   `Route.HAND_OFF` only: the first token is sampled; blocks stay until the KV has left.
   DECODING      `Route.RECEIVE` and `Route.LOCAL`: one token a step, blocks taken as they are needed.
4. FINISHED      no blocks. By a finish reason, a failure, a removal, or handed back for want of blocks.

A request that was begun elsewhere comes with the tokens generated there: they are part of what is computed or received
before the next one is sampled ("prefill tokens" are the prompt and those), and of everything that counts the output.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.engine.constraint import Constraint
from kvbaton.engine.hashing import BlockHashes
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
    """Generated tokens, those that came with the request included."""
    finish_reason: FinishReason | None = None
    num_resumed: int = 0
    """How many tokens of `output` came with the request."""
    priority: int = 0
    """Smaller is served first."""
    arrival: int = 0
    """Numbers the requests of a scheduler as they come."""
    cache_salt: str = ""
    constraint: Constraint | None = None
    num_cached: int = 0
    """Leading tokens whose KV was found in the prefix cache at admission."""
    num_registered: int = 0
    """Leading blocks that the prefix cache knows."""
    window_start: int = 0
    """`Route.RECEIVE`: the first token of which layers with a sliding window get KV, those in the cache apart."""
    hashes: BlockHashes = field(init=False)

    def __post_init__(self) -> None:
        self.hashes = BlockHashes(self.cache_salt)

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.prompt)

    @property
    def num_prefill(self) -> int:
        """Tokens whose KV must be there before the first new one is sampled."""
        return len(self.prompt) + self.num_resumed

    @property
    def num_uncomputed(self) -> int:
        """Prefill tokens that still need a forward pass."""
        return self.num_prefill - self.num_computed

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose KV this worker may ever hold for the request; the last sampled token never needs any."""
        if self.route is Route.HAND_OFF:
            return self.num_prefill
        return self.num_prompt + self.sampling.max_tokens - 1

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether KV may be taken from the cache: the logprobs of a prompt need all of its logits."""
        return self.sampling.prompt_logprobs is None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among others: by priority, then arrival."""
        return self.priority, self.arrival

    def reason_to_end(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the newest token is the last; None when it is not."""
        sampling, token_id = self.sampling, self.output[-1]
        if len(self.output) >= sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
            if token_id in eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output) >= sampling.max_tokens else None

    def token_ids(self, start: int, stop: int) -> Sequence[int]:
        """Tokens `[start, stop)` of prompt and output."""
        num_prompt = len(self.prompt)
        if start >= num_prompt:
            return self.output[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return self.prompt[start:stop]
        return [*self.prompt[start:], *self.output[: stop - num_prompt]]

    def move_to(self, phase: Phase) -> None:
        """Enter `phase`; only the transitions of `TRANSITIONS` exist."""
        assert phase in TRANSITIONS[self.phase], f"{self.request_id}: {self.phase} cannot become {phase}"
        self.phase = phase
