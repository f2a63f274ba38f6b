"""Payloads that have arrived already, put where they would have landed."""

from kvbaton.engine.kv_store import Buffer, Landing


def fill(landing: Landing, payload: Buffer) -> None:
    """Copy `payload` into the landing's parts, whose length it has, and finish it."""
    position, whole = 0, memoryview(payload)
    for part in landing.parts:
        part[:] = whole[position : position + len(part)]
        position += len(part)
    landing.finish()
