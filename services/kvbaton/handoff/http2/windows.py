"""HTTP/2 flow control as numbers (RFC 9113, section 5.2)."""

from kvbaton.handoff.http2.frames import DEFAULT_WINDOW, MAX_WINDOW


class WindowOverflowError(ValueError):
    """A window that passed 2^31-1, or bytes that passed a window."""


class SendWindow:
    """How much the peer lets us send. Smaller settings may make it negative."""

    def __init__(self, value: int = DEFAULT_WINDOW) -> None:
        self.value = value

    def take(self, count: int) -> None:
        """Use `count` bytes of what there is."""
        self.value -= count

    def grow(self, increment: int) -> None:
        """More credit, or less with a negative increment. Raises WindowOverflowError."""
        if self.value + increment > MAX_WINDOW:
            raise WindowOverflowError(f"a window of {self.value} cannot grow by {increment}")
        self.value += increment


class ReceiveWindow:
    """How much we let the peer send, and when it has to hear of more."""

    def __init__(self, size: int, announced: int) -> None:
        """`size` is what is kept open; `announced` is what the peer knows of already."""
        self._size = size
        self._left = announced
        self._unannounced = size - announced

    def take(self, count: int) -> None:
        """`count` bytes came. Raises WindowOverflowError when they were more than allowed."""
        if count > self._left:
            raise WindowOverflowError(f"{count} bytes where {self._left} were allowed")
        self._left -= count

    def release(self, count: int) -> int:
        """`count` of the bytes that came are done with; returns what to announce now, 0 for nothing.

        Small amounts wait until half of the window is used.
        """
        self._unannounced += count
        if self._unannounced * 2 < self._size:
            return 0
        increment, self._unannounced = self._unannounced, 0
        self._left += increment
        return increment
