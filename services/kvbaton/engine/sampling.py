"""How a request wants its next token chosen, and when it ends: values and their checks, no arithmetic."""

import enum
import math
from dataclasses import dataclass, field
from typing import Literal

from kvbaton.engine.errors import InvalidArgumentError

MAX_STOP_TOKEN_IDS = 128
"""Most stop token ids that one request may name."""

MAX_SEED = 2**64 - 1


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that an answer must have."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str
    """The schema, expression or grammar; empty for json_object and choice."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checked sampling parameters; every value is in force, none means "default".

    Raises InvalidArgumentError that names the field when a value is out of its range.
    """

    max_tokens: int
    """Most tokens to generate, 1 or more."""
    seed: int
    """Source of the counter-based noise, 0 to 2**64 - 1."""
    temperature: float = 0.0
    """Softmax temperature, 0 (greedy) to 100."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability, in (0, 1]."""
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    """Token ids that end the sequence, besides EOS."""
    ignore_eos: bool = False
    """Go on after the model's EOS."""
    min_tokens: int = 0
    """Neither EOS nor a stop token or string ends the sequence before it has this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    include_stop_in_output: bool = False
    """Whether the text ends with the stop string, and not before it."""
    structured_output: StructuredOutput | None = None
    """The form that the answer must have."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgumentError("max_tokens", f"{self.max_tokens} is not 1 or more")
        if not math.isfinite(self.temperature) or not 0 <= self.temperature <= 100:
            raise InvalidArgumentError("temperature", f"{self.temperature} is not between 0 and 100")
        if not math.isfinite(self.top_p) or not 0 < self.top_p <= 1:
            raise InvalidArgumentError("top_p", f"{self.top_p} is not above 0 and at most 1")
        if self.top_k < 0:
            raise InvalidArgumentError("top_k", f"{self.top_k} is not 1 or more (leave it out to keep all tokens)")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidArgumentError("seed", f"{self.seed} is not between 0 and {MAX_SEED}")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            count = len(self.stop_token_ids)
            raise InvalidArgumentError("stop_token_ids", f"{count} ids are more than {MAX_STOP_TOKEN_IDS}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1
