"""What a request can end with: one hierarchy, one table."""

import grpc


class KvbatonError(Exception):
    """Base of all errors that the SDK raises for a failed call."""


class InvalidArgumentError(KvbatonError):
    """The request is wrong; `field` names what."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.field = message.partition(":")[0]


class OverloadedError(KvbatonError):
    """The service's queues are full; try again a little later."""


class UnavailableError(KvbatonError):
    """No router or no worker can take the request, or the one that had it was lost."""


class DeadlineExceededError(KvbatonError):
    """The call's timeout has passed."""


class RequestCancelledError(KvbatonError):
    """The call was closed, here or by the service."""


class ServiceError(KvbatonError):
    """The service failed in a way that it did not expect."""


_BY_STATUS: dict[grpc.StatusCode, type[KvbatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
}


def from_status(code: grpc.StatusCode, details: str | None) -> KvbatonError:
    """The exception for a call that ended with `code`."""
    return _BY_STATUS.get(code, ServiceError)(details or code.name)
