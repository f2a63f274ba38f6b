"""Every way in which a request, or a start, can fail. They know nothing of gRPC: `kvbaton.rpc.errors` has the table."""


class KvbatonError(Exception):
    """Base of all errors that kvbaton raises on purpose; the message is meant for the caller to read."""


class InvalidArgumentError(KvbatonError):
    """The request is wrong and will be wrong again."""

    def __init__(self, field: str, problem: str) -> None:
        """`field` is the request's field as the caller wrote it; `problem` says what was wrong and what is allowed."""
        super().__init__(f"{field}: {problem}")
        self.field = field


class NotFoundError(KvbatonError):
    """What the request names does not exist: a model, a ticket."""


class OverloadedError(KvbatonError):
    """A bound was reached; the same request may pass later."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        """`retry_after_seconds` is a hint, sent to the client as RetryInfo."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(KvbatonError):
    """No worker can take the request now, or the one that had it was lost."""


class TransferRejectedError(KvbatonError):
    """The decode worker refused a KV transfer; a new attempt may be made."""


class NotANumberError(KvbatonError):
    """The model's logits for a request were not numbers; nothing can be sampled from them."""


class PreemptedError(KvbatonError):
    """The worker has no blocks or no place for the request and hands it back: it can go on anywhere from its tokens."""


class StartupError(KvbatonError):
    """A service cannot start. The command line prints the message and exits with 2."""
