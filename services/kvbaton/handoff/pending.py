"""Waiting for a device on an event loop."""

import asyncio

from kvbaton.engine.kv_store import Pending


async def settled(pending: Pending | None) -> None:
    """Return when the work is done; other tasks run meanwhile. Raises RuntimeError when the device has failed."""
    if pending is not None and not pending.done():
        await asyncio.to_thread(pending.wait)
