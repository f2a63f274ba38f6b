"""Flow control: credit is neither lost nor made, and small amounts are not announced one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.handoff.http2.frames import MAX_WINDOW
from kvbaton.handoff.http2.windows import ReceiveWindow, SendWindow, WindowOverflowError


@given(st.integers(1, 10_000), st.lists(st.integers(0, 3000)))
def test_what_is_released_is_announced_in_time(size: int, wanted: list[int]) -> None:
    window, credit, announcements = ReceiveWindow(size, size), size, 0
    for count in wanted:
        count = min(count, credit)
        window.take(count)
        increment = window.release(count)
        credit += increment - count
        announcements += increment > 0
        assert size - size // 2 - 1 <= credit <= size or credit > size / 2
    assert announcements <= 2 * sum(wanted) // size + 1


def test_a_peer_that_sends_more_than_allowed_is_found_out() -> None:
    window = ReceiveWindow(100, 100)
    window.take(100)
    with pytest.raises(WindowOverflowError):
        window.take(1)
    assert window.release(100) == 100
    window.take(100)


def test_a_send_window_may_be_negative_and_never_too_large() -> None:
    window = SendWindow(10)
    window.grow(-30)
    assert window.value == -20
    window.grow(MAX_WINDOW + 20)
    with pytest.raises(WindowOverflowError):
        window.grow(1)
