"""What the tests of faults share."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from kvbaton.engine.geometry import KvGeometry
from kvbaton.handoff import sender as sender_module
from kvbaton.handoff.frames import FramePlanner
from support import chaos
from support.chaos import Ends


@pytest.fixture
def frame_bytes() -> int:
    """Small frames, so that there are many; a module may override it."""
    return 300


@pytest.fixture(autouse=True)
def many_frames(frame_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def planner(geometry: KvGeometry, start: int, stop: int) -> FramePlanner:
        return FramePlanner(geometry, start, stop, frame_bytes)

    monkeypatch.setattr(sender_module, "FramePlanner", planner)
    monkeypatch.setattr(sender_module, "REFERENCE_FRAME_BYTES", frame_bytes)


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    # A captured record keeps its error, and with it the frames of whoever raised it.
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """Sender, proxy and receiver of the fakes' model."""
    async with chaos.ends() as made:
        yield made
