"""What the asynchronous and the synchronous client make of a router's events: chunks and results. No calls here."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvbaton.client._errors import RequestCancelledError, ServiceError
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

_FINISH_REASONS = {types.FINISH_REASON_STOP: "stop", types.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: natural logarithms, after penalties, bias and masks, before temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their logprobs, best first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that arrived together: usually one, more when the reader was behind."""

    index: int
    """Index of the first of them in the answer."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain with them; may be empty."""
    sequence: int = 0
    """Which of the n answers."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if asked for."""
    finish_reason: str | None = None
    """Set on the last chunk of the sequence."""
    stop: str | None = None
    """The stop string that ended the sequence, on its last chunk."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GeneratedSequence:
    """One of the n answers."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop" or "length"."""
    stop: str | None = None
    """The stop string that ended it, if one did."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if asked for."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished request. What is asked of the result itself is the first sequence's: with n = 1, the answer's."""

    sequences: tuple[GeneratedSequence, ...]
    """The n answers."""
    usage: Usage
    """Of all sequences together."""
    timings: types.Timings
    """Where the time went, in seconds."""
    request_id: str
    model: str
    seed: int
    prefill_worker: str
    decode_worker: str
    num_resumes: int = 0
    """How often the request was handed back by a worker and went on."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of the prompt's tokens from the second on, if asked for."""

    @property
    def text(self) -> str:
        """The answer."""
        return self.sequences[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.sequences[0].token_ids

    @property
    def finish_reason(self) -> str:
        """ "stop" or "length"."""
        return self.sequences[0].finish_reason

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self.sequences[0].stop

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One for each token, if asked for."""
        return self.sequences[0].logprobs


@dataclass(slots=True)
class _Partial:
    """A sequence as far as it has come."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None

    def add(self, chunk: Chunk) -> None:
        if self.finish_reason is not None:
            raise ServiceError(f"token {chunk.index} came after the end of sequence {chunk.sequence}")
        if chunk.index != len(self.token_ids):
            raise ServiceError(f"token {chunk.index} came where {len(self.token_ids)} was next")
        self.texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.finish_reason, self.stop = chunk.finish_reason, chunk.stop

    def whole(self, finish_reason: str) -> GeneratedSequence:
        return GeneratedSequence(
            "".join(self.texts), tuple(self.token_ids), finish_reason, self.stop, tuple(self.logprobs)
        )


class Assembly:
    """Collects a request's answers from its events."""

    def __init__(self, num_sequences: int = 1) -> None:
        """`num_sequences` is the request's n."""
        self._num_sequences = num_sequences
        self._sequences = {0: _Partial()}
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._finished: pb.GenerateFinished | None = None
        self._closed = False

    def close(self) -> None:
        """The reader has left; what is missing will not come."""
        self._closed = True

    def add(self, response: pb.GenerateResponse) -> Chunk | None:
        """Take in an event; the chunk if it carried tokens. Raises ServiceError when tokens are missing."""
        match response.WhichOneof("event"):
            case "tokens":
                chunk = _chunk(response.tokens)
                if chunk.sequence >= self._num_sequences:
                    raise ServiceError(f"sequence {chunk.sequence} came where n is {self._num_sequences}")
                self._sequences.setdefault(chunk.sequence, _Partial()).add(chunk)
                return chunk
            case "finished":
                self._finished = response.finished
            case "prompt_logprobs":
                self._prompt_logprobs.extend(_logprobs(response.prompt_logprobs.tokens))
        return None

    def result(self) -> GenerationResult:
        """The whole answer. Raises ServiceError when the stream ended before it was whole, or RequestCancelledError."""
        finished = self._finished
        if finished is None and self._closed:
            raise RequestCancelledError("the generation was closed before its end")
        if finished is None:
            raise ServiceError("the stream ended without a result")
        usage = finished.usage
        return GenerationResult(
            sequences=self._whole_sequences(finished),
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            timings=finished.timings,
            request_id=finished.request_id,
            model=finished.model,
            seed=finished.seed,
            prefill_worker=finished.prefill_worker,
            decode_worker=finished.decode_worker,
            num_resumes=finished.num_resumes,
            prompt_logprobs=tuple(self._prompt_logprobs),
        )

    def _whole_sequences(self, finished: pb.GenerateFinished) -> tuple[GeneratedSequence, ...]:
        whole = [self._sequences[0].whole(_FINISH_REASONS.get(finished.finish_reason, "unknown"))]
        for number in range(1, self._num_sequences):
            sequence = self._sequences.get(number)
            if sequence is None or sequence.finish_reason is None:
                raise ServiceError(f"the stream ended before sequence {number} did")
            whole.append(sequence.whole(sequence.finish_reason))
        return tuple(whole)


def _chunk(event: types.TokenEvent) -> Chunk:
    if len(event.logprobs) not in (0, len(event.token_ids)):
        raise ServiceError(f"{len(event.logprobs)} logprobs came with {len(event.token_ids)} tokens")
    return Chunk(
        index=event.first_index,
        token_ids=tuple(event.token_ids),
        text=event.text,
        sequence=event.sequence,
        logprobs=_logprobs(event.logprobs),
        finish_reason=_FINISH_REASONS.get(event.finish_reason),
        stop=event.stop or None,
    )


def _logprobs(tokens: Iterable[types.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            one.token_id, one.logprob, one.rank, tuple(zip(one.top_token_ids, one.top_logprobs, strict=False))
        )
        for one in tokens
    )
