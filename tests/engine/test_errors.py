"""Errors are one family, and carry what the caller needs as fields and as text."""

import pytest

from kvbaton.engine import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError("top_p", "is wrong"),
        errors.NotFoundError("x"),
        errors.OverloadedError("x"),
        errors.UnavailableError("x"),
        errors.TransferRejectedError("x"),
        errors.StartupError("x"),
    ],
)
def test_one_except_clause_catches_all(error: Exception) -> None:
    with pytest.raises(errors.KvbatonError):
        raise error


def test_an_invalid_argument_names_its_field_in_text_and_as_data() -> None:
    error = errors.InvalidArgumentError("sampling.top_p", "2 is not at most 1")
    assert error.field == "sampling.top_p"
    assert str(error) == "sampling.top_p: 2 is not at most 1"


def test_an_overload_says_when_to_come_back() -> None:
    assert errors.OverloadedError("full").retry_after_seconds > 0
    assert errors.OverloadedError("full", 7.5).retry_after_seconds == 7.5
    assert str(errors.OverloadedError("full", 7.5)) == "full"
