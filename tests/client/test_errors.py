"""Every status has its error, and the SDK stands alone."""

import subprocess
import sys

import grpc
import pytest

from kvbaton.client import _errors
from kvbaton.client._errors import KvbatonError, ServiceError, from_status


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, _errors.InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, _errors.OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, _errors.UnavailableError),
        (grpc.StatusCode.ABORTED, _errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, _errors.DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, _errors.RequestCancelledError),
        (grpc.StatusCode.INTERNAL, ServiceError),
        (grpc.StatusCode.UNKNOWN, ServiceError),
        (grpc.StatusCode.UNIMPLEMENTED, ServiceError),
    ],
)
def test_every_status_has_its_error(code: grpc.StatusCode, kind: type[KvbatonError]) -> None:
    error = from_status(code, "field: text")
    assert type(error) is kind
    assert str(error) == "field: text"
    assert str(from_status(code, "")) == str(from_status(code, None)) == code.name


def test_an_invalid_argument_names_its_field() -> None:
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, "prompt.chat.messages[1].role: 'x' is not one of: a, b")
    assert isinstance(error, _errors.InvalidArgumentError)
    assert error.field == "prompt.chat.messages[1].role"


def test_the_sdk_imports_neither_a_model_nor_a_service() -> None:
    program = (
        "import sys, kvbaton.client\n"
        "names = ('torch', 'transformers', 'numpy', 'click', 'opentelemetry', 'kvbaton.engine', 'kvbaton.model',"
        " 'kvbaton.rpc', 'kvbaton.router', 'kvbaton.handoff', 'kvbaton.text', 'kvbaton.cli', 'kvbaton.worker')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
