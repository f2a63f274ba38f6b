"""How a request wants its next token chosen, and when it ends: values and their checks, no arithmetic."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvbaton.engine.errors import InvalidArgumentError

MAX_STOP_TOKEN_IDS = 128
"""Most stop token ids that one request may name."""
MAX_LISTED_TOKEN_IDS = 1024
"""Most token ids that a request may bias, allow or ban, each."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
"""Longest stop string, in characters."""
MAX_LOGPROBS = 20
"""Most likely tokens that may be reported beside each token."""
MAX_STRUCTURED_OUTPUT_BYTES = 64 * 1024
"""Longest description of an answer's form, as UTF-8."""
MAX_CHOICES = 1024

MAX_SEED = 2**64 - 1


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


StructuredOutputKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that an answer must have. Whether its text means anything is for the grammar compiler to say.

    Raises InvalidArgumentError that names the field when it is empty or too long.
    """

    kind: StructuredOutputKind
    text: str = ""
    """The schema, expression or grammar; empty for the kinds that have none."""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name = f"structured_output.{self.kind}"
        if self.kind == "choice":
            name += ".texts"
            if not self.choices:
                raise InvalidArgumentError(name, "is empty")
            check_count(name, len(self.choices), MAX_CHOICES, "texts")
            for index, choice in enumerate(self.choices):
                if not choice:
                    raise InvalidArgumentError(f"{name}[{index}]", "is empty")
        elif self.kind != "json_object" and not self.text:
            raise InvalidArgumentError(name, "is empty")
        num_bytes = sum(len(part.encode()) for part in (self.text, *self.choices))
        check_count(name, num_bytes, MAX_STRUCTURED_OUTPUT_BYTES, "bytes of UTF-8")


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
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the most likely one, in [0, 1]."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that prompt or answer have, in (0, 10]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids, -100 to 100."""
    allowed_token_ids: frozenset[int] = frozenset()
    """Nothing but these can be sampled; empty: all can."""
    banned_token_ids: frozenset[int] = frozenset()
    """These are never sampled."""
    min_tokens: int = 0
    """Neither EOS nor a stop token or string ends the answer before it has this many tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Token ids that end the sequence, besides EOS."""
    ignore_eos: bool = False
    """Go on after the model's EOS."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    include_stop_in_output: bool = False
    """Whether the text ends with the stop string, and not before it."""
    logprobs: int | None = None
    """Report each token's logprob and those of this many most likely ones; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second on."""
    structured_output: StructuredOutput | None = None
    """What form the answer must have."""
    is_plain: bool = field(init=False, repr=False, compare=False)
    """Whether the largest of the model's own logits is the token, and nothing more is to be told about it."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        self._check_combinations()
        object.__setattr__(self, "is_plain", self.is_greedy and self.logprobs is None and not self._changes_logits)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def _changes_logits(self) -> bool:
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.allowed_token_ids
            or self.banned_token_ids
            or self.min_tokens
            or self.structured_output
        )

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ending_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The token ids that end the sequence, once it has min_tokens."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids

    def _check_numbers(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgumentError("max_tokens", f"{self.max_tokens} is not 1 or more")
        if self.top_k < 0:
            raise InvalidArgumentError("top_k", f"{self.top_k} is not 1 or more (leave it out to keep all tokens)")
        _check_above_zero("top_p", self.top_p, 1)
        _check_above_zero("repetition_penalty", self.repetition_penalty, 10)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.min_tokens < 0:
            raise InvalidArgumentError("min_tokens", f"{self.min_tokens} is not 0 or more")
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
        check_count("allowed_token_ids", len(self.allowed_token_ids), MAX_LISTED_TOKEN_IDS, "ids")
        check_count("banned_token_ids", len(self.banned_token_ids), MAX_LISTED_TOKEN_IDS, "ids")
        check_count("logit_bias", len(self.logit_bias), MAX_LISTED_TOKEN_IDS, "ids")
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100, 100)
        check_count("stop", len(self.stop), MAX_STOP_STRINGS, "strings")
        for index, text in enumerate(self.stop):
            if not text:
                raise InvalidArgumentError(f"stop[{index}]", "is empty")
            check_count(f"stop[{index}]", len(text), MAX_STOP_CHARS, "characters")

    def _check_combinations(self) -> None:
        if self.min_tokens > self.max_tokens:
            problem = f"{self.min_tokens} is more than max_tokens, which is {self.max_tokens}"
            raise InvalidArgumentError("min_tokens", problem)
        # The form alone says where the answer ends; after that there is no token that it could allow.
        if self.structured_output is not None and self.min_tokens:
            raise InvalidArgumentError("min_tokens", "cannot be combined with structured_output")
        if self.structured_output is not None and self.ignore_eos:
            raise InvalidArgumentError("ignore_eos", "cannot be combined with structured_output")


def check_token_ids_in_vocabulary(
    params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()
) -> None:
    """Raises InvalidArgumentError for a token id that the model does not have, or when no token could be sampled."""
    for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
        largest = max(getattr(params, name), default=0)
        if largest >= vocab_size:
            raise InvalidArgumentError(name, f"{largest} is not below {vocab_size}")
    largest = max(params.logit_bias, default=0)
    if largest >= vocab_size:
        raise InvalidArgumentError(f"logit_bias[{largest}]", f"{largest} is not below {vocab_size}")
    never = params.banned_token_ids
    if params.min_tokens:
        never |= params.ending_token_ids(eos_token_ids)
    if params.allowed_token_ids:
        if params.allowed_token_ids <= never:
            problem = "no token is left: each is banned, or would end the answer before min_tokens"
            raise InvalidArgumentError("allowed_token_ids", problem)
    elif len(never) >= vocab_size:
        problem = "no token is left: every other one would end the answer before min_tokens"
        raise InvalidArgumentError("banned_token_ids", problem)


def check_count(name: str, count: int, most: int, unit: str) -> None:
    """Raises InvalidArgumentError that names the field when it has more of `unit` than `most`."""
    if count > most:
        raise InvalidArgumentError(name, f"{count} {unit} are more than {most}")


def _check_range(name: str, value: float, low: int, high: int) -> None:
    # Written so that nan, which compares with nothing, is outside.
    if not low <= value <= high:
        raise InvalidArgumentError(name, f"{value} is not between {low} and {high}")


def _check_above_zero(name: str, value: float, high: int) -> None:
    if not 0 < value <= high:
        raise InvalidArgumentError(name, f"{value} is not above 0 and at most {high}")
