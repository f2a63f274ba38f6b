"""The one table between kvbaton's exceptions and gRPC's status codes, and the way back for callers."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from kvbaton.engine.errors import (
    InvalidArgumentError,
    KvbatonError,
    NotANumberError,
    NotFoundError,
    OverloadedError,
    TransferRejectedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries a serialised google.rpc.Status."""

NOT_A_NUMBER_REASON = "NOT_A_NUMBER"
"""Reason of the ErrorInfo that tells a model's failure from a service's, which is INTERNAL as well."""

INTERNAL_MESSAGE = "internal error; the service's log has the cause"

# Status and details share HTTP/2's 8 KiB of trailers, percent-encoded and base64-encoded; past it a peer sees
# RESOURCE_EXHAUSTED in place of the error.
_MAX_MESSAGE_BYTES = 1000

# The table. First match wins, so a subclass stands before its base.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (TransferRejectedError, grpc.StatusCode.ABORTED),
    (NotANumberError, grpc.StatusCode.INTERNAL),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)

# Its inverse, where a code means one exception, and the message is all that it has.
_PLAIN: dict[grpc.StatusCode, type[KvbatonError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ABORTED: TransferRejectedError,
}


@dataclass(frozen=True)
class RpcStatus:
    """How an RPC ends: what `ServicerContext.abort` needs."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...] = ()


def status_code(error: BaseException) -> grpc.StatusCode:
    """Return the table's code for an exception, INTERNAL if it is not in it. Groups are not unwrapped."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def to_rpc_status(error: BaseException) -> RpcStatus:
    """Say how an RPC whose handler raised `error` has to end.

    Groups are unwrapped. An exception that the table does not know is INTERNAL: its traceback is logged here
    and its text, which may name files, addresses or prompts, is kept from the caller.
    """
    cause = root_cause(error)
    code = status_code(cause)
    if code is grpc.StatusCode.INTERNAL and not isinstance(cause, NotANumberError):
        _log.error("a handler failed: %s", cause, exc_info=error)
        return RpcStatus(code, INTERNAL_MESSAGE)
    message = _bounded(str(cause) or code.name.lower().replace("_", " "))
    detail = _detail(cause)
    if detail is None:
        return RpcStatus(code, message)
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(detail)
    return RpcStatus(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> KvbatonError | TimeoutError:
    """Turn the failure of a call to `peer` (host:port) into the exception that the peer raised, or the
    nearest.

    UNAVAILABLE, CANCELLED and every code that kvbaton does not send become `UnavailableError` naming the
    peer.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest()
        if _find_detail(error, violation) and violation.field_violations:
            first = violation.field_violations[0]
            return InvalidArgumentError(first.field, first.description)
        return InvalidArgumentError("request", details)
    if code in _PLAIN:
        return _PLAIN[code](details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        retry = error_details_pb2.RetryInfo()
        if _find_detail(error, retry):
            return OverloadedError(details, retry.retry_delay.ToTimedelta().total_seconds())
        return OverloadedError(details)
    if code is grpc.StatusCode.INTERNAL:
        info = error_details_pb2.ErrorInfo()
        if _find_detail(error, info) and info.reason == NOT_A_NUMBER_REASON:
            return NotANumberError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(f"{peer}: {details}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"{peer} is unavailable: {details}")
    return UnavailableError(f"{peer} failed with {code.name}: {details}")


def root_cause(error: BaseException) -> BaseException:
    """Find what a nest of exception groups is about.

    That is the first `KvbatonError` in it, else the first leaf that is not a cancellation, else the first
    leaf. An exception that is no group is returned as it is.
    """
    found = list(leaves(error))
    for leaf in found:
        if isinstance(leaf, KvbatonError):
            return leaf
    for leaf in found:
        if not isinstance(leaf, asyncio.CancelledError):
            return leaf
    return found[0]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the exceptions in a nest of groups; the exception itself where it is no group."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def _detail(error: BaseException) -> Message | None:
    if isinstance(error, InvalidArgumentError):
        problem = _bounded(str(error).removeprefix(f"{error.field}: "))
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=problem)
        bad_request: Message = error_details_pb2.BadRequest(field_violations=[violation])
        return bad_request
    if isinstance(error, OverloadedError):
        delay = error.retry_after_seconds
        nanos = int(delay * 1e9) if math.isfinite(delay) and delay > 0 else 0
        duration = duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
        retry_info: Message = error_details_pb2.RetryInfo(retry_delay=duration)
        return retry_info
    if isinstance(error, NotANumberError):
        error_info: Message = error_details_pb2.ErrorInfo(reason=NOT_A_NUMBER_REASON, domain="kvbaton")
        return error_info
    return None


def _find_detail(error: grpc.aio.AioRpcError, into: Message) -> bool:
    """Unpack the error's first detail of `into`'s type; a peer's malformed details count as none."""
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
            return any(packed.Unpack(into) for packed in status.details)
        except DecodeError:
            return False
    return False


def _bounded(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return text
    return encoded[: _MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "…"
